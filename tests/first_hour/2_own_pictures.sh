# A folder of pictures, one folder for each class, and a model of timm. Without a network its weights are random.
edgetune recipes new --model timm:test_resnet --data imagefolder:pictures -o pictures.yaml
edgetune run pictures.yaml variant=smoke model.pretrained=false model.image_px=32 --out runs/pictures
edgetune predict runs/pictures/model.pte pictures/dark/0.png
