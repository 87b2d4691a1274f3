"""The JSON Schema of recipes: every technique, every field with its description, unit and default."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgetune.core import registry
from edgetune.recipe.schema import build_schema


def test_schema_knows_every_technique() -> None:
    whole = build_schema()
    forms = whole["properties"]["steps"]["items"]["anyOf"]
    names = [*registry.TECHNIQUES, *registry.STEPS]
    assert forms[0]["enum"] == names
    settings_of = {next(iter(f["properties"])): f["properties"] for f in forms[1:]}
    assert list(settings_of) == names
    lora = settings_of["lora"]["lora"]["anyOf"][0]
    assert set(lora["properties"]) == set(registry.technique_class("lora").model_fields)
    assert lora["additionalProperties"] is False
    defined = set(whole["$defs"])
    assert {ref.rpartition("/")[2] for ref in references(whole)} <= defined
    assert "name" not in whole["required"]


def test_schema_describes_every_field() -> None:
    """With a unit where the name has one, and with a default unless the field must be given."""
    fields = {path: (field, required) for path, field, required in fields_of_schema(build_schema(), "")}
    assert len(fields) > 85
    units = {"_pct": "ercentage", "_mib": "MiB", "_ms": "ms", "_px": "pixels", "_bits": "its"}
    for path, (field, required) in fields.items():
        words = field.get("description", "")
        assert words.endswith("."), f"{path} is not described"
        assert "\n" not in words
        unit = next((unit for ending, unit in units.items() if path.endswith(ending)), "")
        assert unit in words, f"{path} is described without its unit"
        assert required or "default" in field or path == "/name", f"{path} has no default"


def fields_of_schema(value: Any, path: str) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Every property of every object in it: its path, itself, and whether it must be given."""
    if isinstance(value, list):
        for inner in value:
            yield from fields_of_schema(inner, path)
    if isinstance(value, dict):
        for name, field in value.get("properties", {}).items():
            yield f"{path}/{name}", field, name in value.get("required", ())
            yield from fields_of_schema(field, f"{path}/{name}")
        for key in ("anyOf", "items", "prefixItems"):
            yield from fields_of_schema(value.get(key), path)
        for name, kind in value.get("$defs", {}).items():
            yield from fields_of_schema(kind, name)


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)
