"""Cache the outputs of the frozen first stages on disk, so that later epochs start after them."""
