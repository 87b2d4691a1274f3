"""Recipes: YAML text to a checked value, with places, overrides and the schema."""
