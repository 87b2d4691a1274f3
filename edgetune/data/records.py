"""Records of tables: each is checked, then all are split into a data set for the task that the columns imply."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from edgetune.core.errors import EdgetuneError
from edgetune.data.chat import ANSWERING, read_messages, split_key
from edgetune.data.dataset import (
    NOT_UTF8,
    BadRows,
    Dataset,
    assemble,
    classes_of,
    complete_parts,
    data_error,
)
from edgetune.data.labels import check_labels, is_missing
from edgetune.data.rows import Rows
from edgetune.data.settings import DataSettings
from edgetune.tasks.causal_lm import CausalLM
from edgetune.tasks.entities import is_tag, tags_in_order
from edgetune.tasks.regression import Regression
from edgetune.tasks.task import Task
from edgetune.tasks.text_classification import TextClassification
from edgetune.tasks.token_classification import TokenClassification

Record = tuple[Any, Any]  # text, words or conversation; class, number, tags, or nothing


def add_record(records: list[Record], bad: BadRows, place: str, values: Sequence[Any], settings: DataSettings) -> None:
    """Add one row to `records`, or to `bad` with the reason. `values` are those of `settings.columns`."""
    try:
        if settings.messages is not None:
            records.append((_conversation(values, settings), None))
        elif settings.tags is not None:
            records.append(tagged_words(values[0], values[1], settings))
        elif settings.target is not None:
            records.append((_text(values[:-1]), _number(values[-1])))
        elif settings.label is not None:
            text = _text(values[:-1])
            records.append((text, _rename_label(_label(values[-1], settings), settings)))
        else:
            records.append((_text(values), None))
    except EdgetuneError:  # a fault of the whole table
        raise
    except ValueError as error:
        bad.add(place, str(error))


def _text(parts: Sequence[Any]) -> str:
    """The text columns joined into one. Raises `ValueError` with the reason if there is no text."""
    other = next((part for part in parts if not isinstance(part, str)), None)
    if other is not None:
        raise ValueError(f"the text is {type(other).__name__}, not a string")
    text = "\n".join(part for part in parts if part.strip()) if len(parts) > 1 else str(parts[0])
    if not text.strip():
        raise ValueError("empty text")
    return _check_readable(text)


def _check_readable(text: str) -> str:
    """The text. Raises for bytes that are not UTF-8, which appear as lone surrogates, and for a zero byte."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(NOT_UTF8)
    if "\0" in text:
        raise ValueError("a zero byte")
    return text


def _label(label: Any, settings: DataSettings) -> str:
    text = str(label).strip()
    if isinstance(label, float) and not math.isnan(label):
        raise ValueError("the label is a number with a fraction, not a class: set data.target to predict numbers")
    if not isinstance(label, (str, int)) and not is_missing(label):
        raise ValueError(f"the label is a {type(label).__name__}, not one class")
    if not text:
        raise ValueError("empty label")
    if is_missing(text) and text not in (settings.label_names or {}):
        raise ValueError(f"the label is missing: {label}")
    return _check_readable(text)


def _number(value: Any) -> float:
    if is_missing(value):
        raise ValueError(f"the number is missing: {value}" if str(value).strip() else "the number is missing")
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"the target is not a number: {str(value)[:40]}")
    return number


def tagged_words(words: Any, tags: Any, settings: DataSettings) -> Record:
    """Words and their tags, from lists or from texts with spaces. Raises `ValueError` if they do not match."""
    both = [each.split() if isinstance(each, str) else each for each in (words, tags)]
    for name, each in zip(("words", "tags"), both, strict=True):
        if not isinstance(each, (list, tuple)):
            raise ValueError(f"the {name} are {type(each).__name__}, not a list")
    words, tags = both[0], [_rename_label(str(tag), settings) for tag in both[1]]
    if not words:
        raise ValueError("no words")
    if len(words) != len(tags):
        raise ValueError(f"{len(tags)} tags for {len(words)} words")
    if not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError("a word is empty, or no string")
    strange = next((tag for tag in tags if not is_tag(tag)), None)
    if strange is not None:
        raise ValueError(f"{strange!r} is no tag of the form O, B-kind or I-kind")
    return tuple(_check_readable(word) for word in words), tuple(tags)


def _conversation(values: Sequence[Any], settings: DataSettings) -> Any:
    messages = values[0]
    if not isinstance(settings.messages, str):
        messages = [{"role": role, "content": each} for role, each in zip(("user", ANSWERING), values, strict=True)]
    conversation = read_messages(messages, settings.loss_on == "answers")
    for _, content in conversation.messages:
        _check_readable(content)
    return conversation


def _rename_label(label: str, settings: DataSettings) -> str:
    """The name of a label in `settings.label_names`; raises if it is missing there."""
    names = settings.label_names
    if names is None:
        return label
    if label not in names:
        raise data_error(
            "data.label_names lacks a label of the table",
            got=label,
            allowed=sorted(names),
            action=f"add it, as in {{{label}: its name}}",
        )
    return names[label]


def build_dataset(
    name: str,
    train: list[Record],
    bad: BadRows,
    total: int,
    settings: DataSettings,
    others: dict[str, list[Record]] | None = None,
) -> Dataset:
    """The data set of the rows that were read; missing parts are split off the training rows."""
    others = others or {}
    notes = bad.notes(total, name)
    labels = [label for part in (train, *others.values()) for _, label in part]
    task: Task = CausalLM()
    if settings.label is not None:
        notes = (*notes, *check_labels(name, settings.label, labels))
        task = TextClassification(classes_of(labels))
    elif settings.target is not None:
        task = Regression()
    elif settings.tags is not None:
        task = TokenClassification(tags_in_order(tag for tags in labels for tag in tags))
    if not train:
        raise data_error(f"{name} contains no rows")
    keys = [split_key(row) for row, _ in train]

    def rows(records: list[Record]) -> Rows:
        return rows_of([text for text, _ in records], [label for _, label in records], task)

    copies = len(keys) - len(set(keys))
    if copies and settings.messages is not None:
        notes = (*notes, f"{copies:,} conversations start like another one; these are put into the same split")
    elif copies:
        notes = (*notes, f"{copies:,} texts are copies of others; copies are put into the same split")
    train_texts = {text for text, _ in train}
    shared = sum(text in train_texts for text, _ in others.get("test", ()))
    if shared:
        kind = "texts" if settings.messages is None else "conversations"
        notes = (*notes, f"{shared:,} test {kind} are also among the training rows")
    parts = complete_parts(keys, rows(train), settings, **{part: rows(records) for part, records in others.items()})
    return assemble(name, task, parts, settings, notes)


def rows_of(inputs: Sequence[Any], labels: Sequence[Any], task: Task) -> Rows:
    """The rows of a task, with labels as numbers."""
    number = {name: place for place, name in enumerate(task.labels)}
    if isinstance(task, CausalLM):
        return Rows(inputs)
    if isinstance(task, TokenClassification):
        return Rows(inputs, [tuple(number[tag] for tag in tags) for tags in labels])
    return Rows(inputs, [number.get(label, label) for label in labels])
