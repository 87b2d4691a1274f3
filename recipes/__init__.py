"""Golden recipes, as YAML."""
