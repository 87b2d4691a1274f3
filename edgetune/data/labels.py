"""Check a column of labels before anything trains on it: an error if it contains no classes, else notes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from edgetune.data.dataset import data_error

MISSING = frozenset({"", "nan", "none", "null", "n/a", "na", "<na>", "nat"})  # as pandas and JSON write it
_MOST_CLASSES = 20  # more of them, at fewer rows each than this, are no classes
_ROWS_EACH = 3
_DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}([T ].*)?|\d{1,2}[./]\d{1,2}[./]\d{2,4}")
_NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?([eE][-+]?\d+)?")
_SKEWED = 10  # rows of the commonest class for one of the rarest


def is_missing(label: object) -> bool:
    """Whether a label stands for a missing value: `nan`, `null`, `N/A`."""
    return str(label).strip().casefold() in MISSING


def check_labels(name: str, column: str, labels: Sequence[str]) -> tuple[str, ...]:
    """Notes about these labels, one for each row.

    Raises `EdgetuneError` if they are numbers, dates or ids rather than classes.
    """
    counts = Counter(labels)
    if len(counts) > _MOST_CLASSES and len(labels) < _ROWS_EACH * len(counts):
        scale = sum(bool(_NUMBER.fullmatch(label)) for label in counts) > len(counts) / 2
        kind = "numbers on a scale" if scale else "no classes"
        action = "set data.label to a column of classes, or group the values into a few classes first"
        if scale:
            action = f"write target: {column} instead of label, to predict the number"
        values = f"{len(counts):,} different values in {len(labels):,} rows"
        raise data_error(
            f"{name}: the column {column!r} has {values}, so they are {kind}",
            got=", ".join(list(counts)[:3]) + " ...",
            action=action,
        )
    notes = []
    if all(_DATE.fullmatch(label) for label in counts):
        notes.append(f"the labels in column {column!r} look like dates: {', '.join(sorted(counts)[:3])}")
    spelt: dict[str, list[str]] = {}
    for label in sorted(counts):
        spelt.setdefault(" ".join(label.casefold().split()), []).append(label)
    alike = next((same for same in spelt.values() if len(same) > 1), [])
    if alike:
        notes.append(f"labels that differ only in capitals or spaces are separate classes: {', '.join(alike)}")
    numbers = [label for label in counts if _NUMBER.fullmatch(label)]
    if numbers and len(numbers) < len(counts):
        words = sorted(set(counts) - set(numbers))
        notes.append(f"the labels mix numbers ({', '.join(sorted(numbers)[:3])}) and words ({', '.join(words[:3])})")
    if len(counts) > 1:
        (most, rows), (least, few) = counts.most_common()[0], counts.most_common()[-1]
        if rows >= _SKEWED * few:
            advice = "train.class_weights: balanced gives each class the same weight"
            notes.append(f"{rows:,} rows are {most!r} and {few:,} are {least!r}: {advice}")
    return tuple(notes)
