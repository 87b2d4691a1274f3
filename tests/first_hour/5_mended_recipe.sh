# A step that cannot work stops the run before anything trains; a step that is changed later costs no second training.
edgetune run mended.yaml --out runs/mended  # exit 2: int4 is to skip a layer that is not there
edgetune run mended.yaml 'int4.skip=[classifier]' --out runs/mended --resume
edgetune run mended.yaml 'int4.skip=[classifier]' int4.embeddings=none --out runs/mended --resume
