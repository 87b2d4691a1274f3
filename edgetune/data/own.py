"""Rows from the user's own function: `py:file.py:splits`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.core.own_code import PREFIX, call_own
from edgetune.data.chat import Conversation, is_messages, read_messages, split_key
from edgetune.data.dataset import Dataset, assemble, classes_of, complete_parts, data_error
from edgetune.data.records import rows_of, tagged_words
from edgetune.data.rows import Rows
from edgetune.data.settings import DataSettings
from edgetune.tasks.causal_lm import CausalLM
from edgetune.tasks.entities import tags_in_order
from edgetune.tasks.image_classification import ImageClassification
from edgetune.tasks.regression import Regression
from edgetune.tasks.task import Task
from edgetune.tasks.text_classification import TextClassification
from edgetune.tasks.token_classification import TokenClassification

_PARTS = ("train", "validation", "test")
_TEXTS = ("text", "conversation")  # kinds of rows; the others are images
_FORM = 'return a list of (text or image, label), or {"train": [...], "validation": [...], "test": [...]}'


def own_splits(argument: str, settings: DataSettings) -> Dataset:
    """The rows that `splits()` returns: `(input, label)` in one list, or in one for each part; missing parts are split
    off.

    An input is a text, the path of an image, a Pillow image, or a `uint8` array `(height, width[, 3])`; all
    are of one kind, arrays of one size. A label is a string or an integer; a float is a number to predict, and a
    list of tags goes with a list of words. For a language model rows are texts, or conversations as lists of
    `{role, content}`.
    """
    source = f"{PREFIX}{argument}"
    given = call_own(source)
    parts = dict(given) if isinstance(given, Mapping) else {"train": given}
    unknown = [name for name in parts if name not in _PARTS]
    if unknown or "train" not in parts:
        raise data_error(f"{source} returns no training rows", got=list(parts), allowed=_PARTS, action=_FORM)
    rows = {name: _read(source, name, part, settings) for name, part in parts.items()}
    kinds = {kind for part in rows.values() for _, _, kind in part}
    if len(kinds) > 1:
        raise data_error(f"{source} returns rows of several kinds", got=", ".join(sorted(kinds)), action=_FORM)
    labelled = {label is not None for part in rows.values() for _, label, _ in part}
    if len(labelled) > 1:
        raise data_error(f"{source} returns rows with and without a label", action=_FORM)
    return _assemble(source, rows, kinds.pop(), labelled.pop(), settings)


Record = tuple[Any, Any, str]  # input; class, number, tags or None; kind


def _read(source: str, part: str, rows: Any, settings: DataSettings) -> list[Record]:
    if hasattr(rows, "iterrows"):  # the rows of a data frame of pandas; as a sequence it is its columns
        action = "return the pairs of two columns: list(zip(frame.text, frame.label))"
        raise data_error(f"{source}: {part} is a data frame, not a list of rows", action=action)
    if isinstance(rows, (str, bytes)) or not isinstance(rows, Iterable):
        raise data_error(f"{source}: {part} is not a list of rows", got=type(rows).__name__, action=_FORM)
    records = []
    for number, row in enumerate(rows):
        pair = isinstance(row, (tuple, list)) and len(row) == 2 and not is_messages(row)
        value, label = row if pair else (row, None)
        place = f"{source}: {part} row {number}"
        if isinstance(label, (list, tuple)):
            records.append((*_read_tags(place, value, label, settings), "tagged words"))
            continue
        value, kind = _input(place, value, settings.loss_on == "answers")
        records.append((value, _label(place, label), kind))
    if not records:
        raise data_error(f"{source} returns no {part} rows", action=_FORM)
    return records


def _read_tags(place: str, words: Any, tags: Any, settings: DataSettings) -> tuple[Any, Any]:
    try:
        return tagged_words(words, tags, settings)
    except ValueError as error:
        raise data_error(f"{place}: {error}") from error


def _label(place: str, label: Any) -> str | float | None:
    """A class as a string, a number to predict as a float."""
    if isinstance(label, (float, np.floating)):
        if not math.isfinite(label):
            raise data_error(f"{place}: the number to predict is not finite", got=float(label))
        return float(label)
    if label is not None and not isinstance(label, (str, int, np.integer)):
        message = f"the label of {place} is neither a string nor a number"
        raise data_error(message, got=type(label).__name__)
    return None if label is None else str(label)


def _input(place: str, value: Any, answers_only: bool) -> tuple[Any, str]:
    if is_messages(value):
        try:
            return read_messages(value, answers_only), "conversation"
        except ValueError as error:
            raise data_error(f"{place}: {error}") from error
    if isinstance(value, str):
        if not value.strip():
            raise data_error(f"{place} is an empty text")
        return value, "text"
    if isinstance(value, Path):
        return value, "path of an image"
    if hasattr(value, "convert"):  # a Pillow image
        return np.asarray(value.convert("RGB")), "image"
    if isinstance(value, Mapping):
        raise data_error(f"{place} is a mapping", got=", ".join(map(str, value)), action=_FORM)
    array = np.asarray(value)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        shape = f"{array.dtype} {array.shape}"
        action = "give a text, a path, a Pillow image, or a uint8 array (height, width[, 3])"
        raise data_error(f"{place} is neither a text nor an image", got=shape, action=action)
    return array, "image"


def _assemble(
    source: str, parts: Mapping[str, list[Record]], kind: str, labelled: bool, settings: DataSettings
) -> Dataset:
    if not labelled and kind not in _TEXTS:
        raise data_error(f"{source} returns images without a label", action=_FORM)
    if labelled and kind == "conversation":
        raise data_error(f"{source} returns conversations with a label", action="return only the messages")
    labels = [label for part in parts.values() for _, label, _ in part]
    task = _task_of(source, kind, labels if labelled else [])

    def rows(part: list[Record]) -> Rows:
        inputs: Any = [value for value, _, _ in part]
        if kind == "image":
            shapes = sorted({value.shape for value in inputs})
            if len(shapes) > 1:
                action = "resize them to one size, or give paths"
                raise data_error(f"{source} returns images of several sizes", got=shapes[:3], action=action)
            inputs = np.stack(inputs)
        return rows_of(inputs, [label for _, label, _ in part], task)

    keys = [_key(value) for value, _, _ in parts["train"]]
    split = complete_parts(keys, settings=settings, **{name: rows(part) for name, part in parts.items()})
    return assemble(source, task, split, settings)


def _task_of(source: str, kind: str, labels: Sequence[Any]) -> Task:
    if kind == "tagged words":
        return TokenClassification(tags_in_order(tag for tags in labels for tag in tags))
    numbers = sum(isinstance(label, float) for label in labels)
    if numbers:
        if numbers < len(labels) or kind not in _TEXTS:
            action = "return texts, each with a float" if kind not in _TEXTS else "return a float for every row"
            raise data_error(f"{source} returns {kind} rows with numbers to predict", action=action)
        return Regression()
    if kind not in _TEXTS:
        return ImageClassification(classes_of(labels))
    return TextClassification(classes_of(labels)) if labels else CausalLM()


def _key(value: Any) -> str:
    """Equal for copies, which stay in one part of a split."""
    if isinstance(value, (str, Conversation, tuple)):
        return split_key(value)
    return hashlib.sha256(value.read_bytes() if isinstance(value, Path) else value.tobytes()).hexdigest()
