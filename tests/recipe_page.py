"""docs/recipes.md and the schema file beside the packaged recipes, made from the JSON Schema of a recipe.

python tests/recipe_page.py --write
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from edgetune.schema import SCHEMA_FILE, first_line, schema

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "recipes.md"
SCHEMA = ROOT / "recipes" / SCHEMA_FILE

INTRODUCTION = """# Recipes

A recipe is a YAML file that describes a whole job: the model, the data, the steps in order, and what to do with the
result. `edgetune run recipe.yaml` runs it and writes all results to a new folder under `runs/`.

```yaml
{whole}```

- `edgetune recipes list` prints the packaged recipes. `edgetune recipes copy NAME` copies one as a starting point.
- `edgetune run recipe.yaml --dry-run` prints the plan of a run. Before a run starts, all errors of the recipe are
  reported at once, each with its line.
- `edgetune run recipe.yaml train.epochs=2` overrides a setting for one run. `train.epochs` is the field of every
  `train` step, `train[2].epochs` that of the second `train` step, and `steps.3.ratio` that of the third step.
- Paths in a recipe are relative to its file.
- Patterns, as in `targets` and `skip`, are shell patterns of dotted layer names: `*.query` matches every layer called
  `query`.
- An editor with the YAML language server completes and checks a recipe whose first line is
  `# yaml-language-server: $schema=...`, as in the packaged recipes and their copies. `edgetune recipes schema` prints
  the schema.

This page is generated from the schema by `make pages`. A field without a default is required.
"""

WHOLE = """name: reviews
model: minilm
data: {source: "csv:reviews.csv", text: review, label: stars}

steps:
  - sparse-update: {scheme: last-2}
  - train: {epochs: 2, learning_rate: 5e-4}
  - int4

export: {target: xnnpack, check_rows: 100}
profile: {devices: [pixel-8, raspberry-pi-5]}
budget: {device: pixel-8, latency_ms: 20, size_mib: 25}

variants:
  smoke: {data.train_rows: 64, train.epochs: null, train.updates: 4}
"""

# what is put into a whole recipe to be checked, by section or step
EXAMPLES = {
    "model": "model: {source: minilm, max_length: 64}\n",
    "data": 'data: {source: "jsonl:tickets.jsonl", text: message, label: queue, test_pct: 20}\n',
    "export": "export: {target: xnnpack, check_rows: 200, min_same_prediction_pct: 98}\n",
    "profile": "profile: {devices: [pixel-8, raspberry-pi-5], measure: false}\n",
    "budget": "budget:\n"
    "  - {device: pixel-8, latency_ms: 20, size_mib: 25}\n"
    "  - {device: raspberry-pi-5, peak_memory_mib: 200}\n",
    "lora": '- lora: {rank: 8, targets: ["*.query", "*.value"], also_train: [classifier]}\n',
    "sparse-update": '- sparse-update: {scheme: {"encoder.layer.5": full, "*.query": bias, "*.output.dense": 0.25}}\n',
    "prune": "- prune: {ratio: 0.3, importance: activation}\n",
    "int4": "- int4: {group_size: 32, embeddings: int8, skip: [classifier]}\n",
    "int8": "- int8: {calibration_batches: 16}\n",
    "nf4": "- nf4: {block_size: 64}\n",
    "train": "- train: {epochs: 2, batch_size: 16, learning_rate: 5e-4, keep_best: true}\n",
    "eval": "- eval\n",
    "finalize": "- finalize\n",
    "distill": "- prune: {ratio: 0.3}\n- train: {epochs: 1, distill: {teacher: prune, weight: 0.5}}\n",
    "slice": '- sparse-update: {scheme: {"*.intermediate.dense": {ratio: 0.25, by: fisher}}}\n',
}
SECTIONS = {"model": "ModelSettings", "data": "DataSettings", "export": "ExportSettings", "profile": "ProfileSettings",
            "budget": "Budget"}  # fmt: skip
PARTS = {"Slice": "slice", "Distill": "distill"}  # settings inside the settings of a step
TYPES = {"string": "string", "integer": "integer", "number": "number", "boolean": "`true` or `false`"}


def page() -> str:
    """The page in Markdown."""
    whole = schema()
    kinds = whole["$defs"]
    steps = {
        name: (field["description"], field["anyOf"][0])
        for form in whole["properties"]["steps"]["items"]["anyOf"]
        for name, field in form.get("properties", {}).items()
    }
    text = INTRODUCTION.format(whole=WHOLE)
    text += "\n## The whole recipe\n\n" + table(whole)
    for name, kind in SECTIONS.items():
        text += section(f"## {name}", name, kinds[kind]["description"], kinds[kind])
    text += f"\n## Steps\n\n{whole['properties']['steps']['description']} What a step adds, such as the adapters of\n"
    text += "`lora`, is finalized before the next step that needs plain layers, and at the end.\n"
    for name, (description, settings) in steps.items():
        text += section(f"### {name}", name, description, settings)
    for kind, name in PARTS.items():
        text += section(f"### {name}", name, kinds[kind]["description"], kinds[kind])
    return text


def section(heading: str, name: str, description: str, settings: dict[str, Any]) -> str:
    fields = table(settings) if settings.get("properties") else "It has no settings.\n"
    return f"\n{heading}\n\n{first_line(description)}\n\n```yaml\n{EXAMPLES[name]}```\n\n{fields}"


def table(settings: dict[str, Any]) -> str:
    """One row for each field."""
    lines = ["| field | type | default | description |", "|---|---|---|---|"]
    required = settings.get("required", ())
    for name, field in settings["properties"].items():
        default = "" if name in required or "default" not in field else f"`{json.dumps(field['default'])}`"
        cells = (f"`{name}`", joined(dict.fromkeys(types(field))), default, field["description"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def types(field: dict[str, Any]) -> Iterator[str]:
    """The forms that a value takes, `null` left out: where it is allowed it is the default."""
    if "anyOf" in field:
        for form in field["anyOf"]:
            yield from types(form)
    elif "$ref" in field:
        kind = field["$ref"].rpartition("/")[2]
        name = PARTS.get(kind) or next(name for name, of in SECTIONS.items() if of == kind)
        yield f"[{name}](#{name})"
    elif "enum" in field or "const" in field:
        yield from (f"`{json.dumps(value).strip(chr(34))}`" for value in field.get("enum", [field.get("const")]))
    elif "prefixItems" in field:
        yield "list of " + ", ".join(next(types(item)) for item in field["prefixItems"])
    elif field.get("type") == "array":
        inner = [] if "anyOf" in field["items"] else list(types(field["items"]))
        yield f"list of {joined(inner)}" if inner else "list of [steps](#steps)"
    elif field.get("type") == "object":
        yield "mapping (see [slice](#slice))" if "Slice" in str(field) else "mapping"
    elif field["type"] != "null":
        yield TYPES[field["type"]] + bounds(field)


def bounds(field: dict[str, Any]) -> str:
    """What a number may be: ` from 1`, ` above 0 to 1`."""
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    parts = [f"{word} {field[key]:g}" for key, word in words.items() if key in field and field[key] != 2**32]
    parts += [f"in steps of {field['multipleOf']}"] if "multipleOf" in field else []
    return "".join(f" {part}" for part in parts)


def joined(words: Iterable[str]) -> str:
    """`a, b or c`."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def schema_text() -> str:
    """The schema file beside the packaged recipes."""
    return json.dumps(schema(), indent=1) + "\n"


if __name__ == "__main__":
    if "--write" not in sys.argv:
        sys.exit(__doc__)
    PAGE.write_text(page(), encoding="utf-8")
    SCHEMA.write_text(schema_text(), encoding="utf-8")
