"""Recipes: from YAML text to a checked value, with line numbers, overrides and the JSON Schema."""
