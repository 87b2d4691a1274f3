# A table of one's own becomes a program that answers. reviews.csv has columns id, review, sentiment.
edgetune recipes new --model hf:checkpoint --data csv:reviews.csv -o reviews.yaml
edgetune run reviews.yaml variant=smoke --out runs/reviews
edgetune predict runs/reviews/model.pte "very good text"
edgetune eval runs/reviews/model.pte --data csv:reviews.csv data.text=review data.label=sentiment
