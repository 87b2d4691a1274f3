"""The JSON Schema of a recipe file."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from edgetune.recipe.recipe import Recipe, settings_class, step_names

SCHEMA_FILE = "recipe.schema.json"  # beside the packaged recipes, made by `make pages`
EDITOR_LINE = "# yaml-language-server: $schema="  # what editors read the schema of a YAML file from


def build_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file, with the settings of every technique; for editors and other tools."""
    whole = Recipe.model_json_schema(ref_template="#/$defs/{model}")
    definitions: dict[str, Any] = whole["$defs"]
    del definitions["Step"], definitions["StepSettings"]
    forms: list[dict[str, Any]] = [{"enum": step_names(), "description": "A step with the defaults of its settings."}]
    for name, kind in ((name, settings_class(name)) for name in step_names()):
        own = kind.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= own.pop("$defs", {})
        settings = {"description": first_line(own["description"]), "anyOf": [own, {"type": "null"}]}
        forms.append(
            {"type": "object", "properties": {name: settings}, "required": [name], "additionalProperties": False}
        )
    properties = whole["properties"]
    steps = {"type": "array", "minItems": 1, "items": {"anyOf": forms}}
    properties["steps"] = {"description": properties["steps"]["description"], **steps}
    properties["model"] = _add_short_form({"type": "string"}, properties["model"])
    properties["data"] = _add_short_form({"type": "string"}, properties["data"])
    properties["budget"] = _add_short_form({"$ref": "#/$defs/Budget"}, properties["budget"])
    whole["required"] = [key for key in whole["required"] if key != "name"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_unwrap(whole)}


def _add_short_form(short: dict[str, Any], long: dict[str, Any]) -> dict[str, Any]:
    """A property that also has a short form, under the description of the long one."""
    shared: dict[str, Any] = {key: long[key] for key in ("title", "description", "default") if key in long}
    return {**shared, "anyOf": [short, {key: value for key, value in long.items() if key not in shared}]}


def _unwrap(value: Any) -> Any:
    """The same with each paragraph of a description on one line, as editors show it."""
    if isinstance(value, list):
        return [_unwrap(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    plain = {key: _unwrap(inner) for key, inner in value.items()}
    if isinstance(plain.get("description"), str):
        plain["description"] = "\n\n".join(" ".join(part.split()) for part in plain["description"].split("\n\n"))
    return plain


def first_line(text: str) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join(text.split("\n\n")[0].split())


def add_editor_line(text: str) -> str:
    """The text of a recipe, with a first line that names the packaged schema for editors.

    >>> print(add_editor_line("name: mine").replace(str(Path.cwd()), "..."))  # doctest: +ELLIPSIS
    # yaml-language-server: $schema=file://...recipe.schema.json
    name: mine
    """
    path = Path(str(resources.files("edgetune.recipes").joinpath(SCHEMA_FILE)))
    first, _, rest = text.partition("\n")
    return f"{EDITOR_LINE}{path.as_uri()}\n{rest if first.startswith(EDITOR_LINE) else text}"
