# A classifier that somebody has trained, converted without data: its classes are its own.
edgetune export hf:classifier -o classifier.pte
edgetune predict classifier.pte "very good text"
