"""Write a first recipe for the user's own model and data: short, commented, and ready to run."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from edgetune.core import registry
from edgetune.core.errors import EdgetuneError
from edgetune.data.columns import LABELS, TEXTS, likely_column, named_column
from edgetune.data.dataset import Dataset
from edgetune.data.settings import DataSettings
from edgetune.models.labels import match_classes, output_names
from edgetune.recipe.located import relative_source

TaskName = Literal["text", "image", "language"]
_LOOKED_AT = 200  # rows, to tell which column is which
_CHATS = ("messages", "conversations", "conversation")
_QUESTIONS = ("question", "prompt", "instruction", "user", "input")
_WORDS, _TAGS = ("tokens", "words"), ("tags", "ner_tags", "labels")
_ANSWERS = ("answer", "response", "completion", "assistant", "output")
_STEPS: Mapping[TaskName, str] = {
    "text": """\
  # train the last two blocks and the head; the backward pass stops there, which saves memory
  - sparse-update: {scheme: last-2}
  - train: {epochs: 2, learning_rate: 5e-4}
  # 4-bit weights in groups of 32, 8-bit activations
  - int4
""",
    "image": """\
  # train the last four blocks and the head; the backward pass stops there, which saves memory
  - sparse-update: {scheme: last-4}
  - train: {epochs: 2, learning_rate: 2e-3}
  # 8-bit weights and activations, with ranges calibrated on training images
  - int8
""",
    "language": """\
  # train adapters on two projections of each attention, and nothing else
  - lora: {rank: 8, targets: %s}
  - train: {epochs: 1, batch_size: 8, learning_rate: 5e-4}
  # 4-bit weights in groups of 32, 8-bit activations; the head stays at 8 bits
  - int4: {int8_linears: [%s]}
""",
}


def new_recipe(
    path: Path,
    model: str,
    data: str,
    *,
    task: TaskName | None = None,
    text: str | None = None,
    label: str | None = None,
) -> str:
    """The text of a recipe that fine-tunes `model` on `data`, compresses and exports it.

    Args:
        path: the file to write; its stem is the recipe's name, and paths in the recipe are relative to it.
        model: `minilm`, `hf:PATH`, `timm:NAME`, `py:file.py:build`; paths relative to the current folder.
        data: `csv:rows.csv`, `imagefolder:photos`, ... It is read, to find out what it contains.
        task: "text" (classes of texts), "image" (classes of images) or "language"; by default inferred from the data.
        text, label: columns of a table; by default inferred.

    Raises:
        EdgetuneError: the model or the data cannot be read, or is for another task than the one asked for.
    """
    for table, kind, source in ((registry.MODELS, "model", model), (registry.DATASETS, "data", data)):
        if source.partition(":")[0] not in table:
            raise registry.unknown_source_error(table, kind, source)
    columns = _infer_columns(data, task, text, label)
    settings = DataSettings.model_validate({"source": data, **columns})
    dataset: Dataset = registry.loader(registry.DATASETS, "data", data)(settings)
    seen = dataset.task.kind
    if task is not None and task != seen:
        raise EdgetuneError(f"this data is not for the task {task}", got=seen, action=f"leave out --task {task}")
    written = {"source": relative_source(data, path.parent), **columns}
    shown = ", ".join(f"{key}: {json.dumps(value)}" for key, value in written.items())
    rows = f"{len(dataset.train):,} training rows, {len(dataset.test):,} to test on"
    classes = f", {len(dataset.classes)} classes" if dataset.classes else ""
    config = _read_config(model)
    size, unit = _size(seen, config)
    head = ", head: new" if _needs_new_head(config, dataset) else ""
    export = "{language: true}" if seen == "language" else "{}"
    return f"""\
name: {path.stem}
model: {{source: {json.dumps(relative_source(model, path.parent))}, {size}{head}}}  # {unit}
data: {{{shown}}}  # {rows}{classes}

steps:
{_steps(seen, config)}
export: {export}  # an ExecuTorch program, verified against the model
profile: {{devices: [pixel-8, raspberry-pi-5]}}  # predictions; `edgetune devices list` prints all ids

variants:
  smoke:  # a test of the whole recipe in about a minute: edgetune run {path.name} variant=smoke
    train.epochs: null
    train.updates: 2
    export.min_same_prediction_pct: 0
"""


def _read_config(model: str) -> Any:
    """The transformers config of an `hf:` model, without its weights; `None` for any other model."""
    if not model.startswith("hf:"):
        return None
    from edgetune.models.loaded import explain_load_errors

    transformers, name = registry.require("transformers", f"the model {model}"), model.removeprefix("hf:")
    with explain_load_errors(model, name):
        return transformers.AutoConfig.from_pretrained(name)


def _needs_new_head(config: Any, dataset: Dataset) -> bool:
    """Whether the checkpoint is a classifier with other classes than the data's, which a run would refuse."""
    if not any(
        str(name).endswith("ForSequenceClassification") for name in getattr(config, "architectures", None) or ()
    ):
        return False
    try:
        match_classes("", output_names(config), dataset.classes, keep=False)
    except EdgetuneError:
        return True
    return False


def _size(task: TaskName, config: Any) -> tuple[str, str]:
    if task == "image":
        return "image_px: 112", "pixels, width and height"
    length = {"text": 64, "language": 128}[task]
    positions = getattr(config, "max_position_embeddings", None) or length
    return f"max_length: {min(length, positions)}", "tokens; longer texts are truncated"


def _steps(task: TaskName, config: Any) -> str:
    if task != "language":
        return _STEPS[task]
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as attention

    targets = attention.get(getattr(config, "model_type", ""), ["q_proj", "v_proj"])
    return _STEPS[task] % (json.dumps([f"*.{target}" for target in targets]), "lm_head")


def _infer_columns(data: str, task: TaskName | None, text: str | None, label: str | None) -> dict[str, Any]:
    """The settings that name the columns of a table; none if the columns have the default names."""
    kind, _, argument = data.partition(":")
    given = {key: value for key, value in (("text", text), ("label", label)) if value is not None}
    if kind not in ("csv", "jsonl") or not Path(argument).expanduser().is_file():
        return dict(given)
    table = _first_rows(Path(argument).expanduser(), kind)
    columns: dict[str, Any] = dict(given)
    chat = named_column(table, _CHATS)
    if not given and task in (None, "language") and chat and table[chat][0].startswith("["):
        return {"messages": chat}
    pair = [named_column(table, _QUESTIONS), named_column(table, _ANSWERS)]
    if not given and task == "language" and all(pair):
        return {"messages": pair}
    tagged = [named_column(table, names) for names in (_WORDS, _TAGS)]
    if not given and task in (None, "text") and all(tagged) and table[str(tagged[0])][0].startswith("["):
        return {"text": tagged[0], "tags": tagged[1]}
    if text is None and "text" not in table and table:
        columns["text"] = likely_column(table, TEXTS) or max(table, key=lambda name: mean(map(len, table[name])))
    if task == "language":
        columns["label"] = None
    elif label is None and "label" not in table:
        others = {name: values for name, values in table.items() if name != columns.get("text", "text")}
        repeating = {n: v for n, v in others.items() if 2 <= len(set(v)) <= max(2, len(v) // 2)}
        columns["label"] = likely_column(others, LABELS) or min(
            repeating, key=lambda n: len(set(repeating[n])), default=None
        )
    column = columns.get("label", "label")
    if column in table and _are_measured(table[column]):
        columns = {name: value for name, value in columns.items() if name != "label"} | {"target": column}
    return columns


def _are_measured(values: Sequence[str]) -> bool:
    """Whether the values of a column are numbers with fractions, which are measured and no classes."""
    try:
        return any(not float(value).is_integer() for value in values)
    except (ValueError, OverflowError):
        return False


def _first_rows(path: Path, kind: str) -> dict[str, list[str]]:
    """The first values of each column as text; empty if the file is not a table (the loader then says why)."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    if kind == "jsonl":
        try:
            rows = [json.loads(line) for line in islice(filter(str.strip, text.splitlines()), _LOOKED_AT)]
        except ValueError:
            return {}
    else:
        header = text.split("\n", 1)[0]
        delimiter = max(",;\t", key=header.count)
        rows = list(islice(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter), _LOOKED_AT))
    rows = [row for row in rows if isinstance(row, dict)]
    names = [name for name in (rows[0] if rows else {}) if isinstance(name, str)]
    return {name: [str(row.get(name) or "") for row in rows] for name in names}
