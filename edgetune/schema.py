"""The JSON Schema of a recipe file."""

from __future__ import annotations

from typing import Any

from edgetune.recipe import Recipe, settings_class, step_names


def schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file, with the settings of every technique; for editors and other tools."""
    whole = Recipe.model_json_schema(ref_template="#/$defs/{model}")
    definitions: dict[str, Any] = whole["$defs"]
    definitions.pop("Step", None)
    forms: list[dict[str, Any]] = [{"enum": step_names()}]
    for name, kind in ((name, settings_class(name)) for name in step_names()):
        own = kind.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= own.pop("$defs", {})
        settings = {"anyOf": [own, {"type": "null"}]}
        forms.append(
            {"type": "object", "properties": {name: settings}, "required": [name], "additionalProperties": False}
        )
    properties = whole["properties"]
    properties["steps"] = {"type": "array", "minItems": 1, "items": {"anyOf": forms}}
    for key in ("model", "data"):
        properties[key] = {"anyOf": [{"type": "string"}, properties[key]]}
    properties["budget"] = {"anyOf": [{"$ref": "#/$defs/Budget"}, properties["budget"]]}
    whole["required"] = [key for key in whole["required"] if key != "name"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole}
