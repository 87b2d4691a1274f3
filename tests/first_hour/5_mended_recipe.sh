# A step that cannot work stops the run before anything trains; a step that is changed later costs no second training.
edgetune run mended.yaml --out runs/mended  # exit 2: the widths that are left do not fit int4
edgetune run mended.yaml prune.round_to=32 --out runs/mended --resume
edgetune run mended.yaml prune.round_to=32 int4.embeddings=none --out runs/mended --resume
