# A folder of pictures, one folder for each class, and a model of timm. Without a network its weights are random.
edgetune recipes new --model timm:mobilenetv3_small_050 --data imagefolder:pictures -o pictures.yaml
edgetune run pictures.yaml variant=smoke model.pretrained=false model.image_px=64 --out runs/pictures
edgetune predict runs/pictures/model.pte pictures/dark/0.png
