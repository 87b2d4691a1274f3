"""What a data loader returns, how rows are split and checked, and how batches are made of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.inputs import Inputs
from edgetune.data.rows import Encode, Rows
from edgetune.data.settings import DataSettings
from edgetune.tasks.task import Parts, Task

NOT_UTF8 = "not in UTF-8"  # why a row cannot be read


@dataclass(frozen=True)
class Dataset:
    """Rows in three disjoint parts, their task, and notes for the report."""

    name: str
    task: Task
    train: Rows
    validation: Rows
    test: Rows
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the task's labels, in order; empty for a task without labels."""
        return self.task.labels

    @property
    def parts(self) -> Parts:
        """The rows of all three."""
        return Parts(self.train, self.validation, self.test)

    def with_parts(self, parts: Mapping[str, Rows], notes: tuple[str, ...] = ()) -> Dataset:
        """The same data with other rows, and with `notes` added."""
        train, validation, test = (parts.get(part, rows) for part, rows in self.parts._asdict().items())
        return replace(self, train=train, validation=validation, test=test, notes=(*self.notes, *notes))

    def with_classes(self, classes: Mapping[str, str]) -> Dataset:
        """The same rows with renamed and reordered classes: each new name, in order, and its present one."""
        if tuple(classes) == self.classes:
            return self
        number = {self.classes.index(old): new for new, old in enumerate(classes.values())}

        def numbered(label: Any) -> Any:
            return tuple(number[tag] for tag in label) if isinstance(label, tuple) else number[label]

        train, validation, test = (Rows(rows.inputs, [*map(numbered, rows.labels or ())]) for rows in self.parts)
        task = self.task.with_labels(classes)
        return replace(self, task=task, train=train, validation=validation, test=test)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the classes and all rows; for an image file, of its path, size and modification time."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for rows in self.parts:
            digest.update(repr(None if rows.labels is None else list(rows.labels)).encode())
            if hasattr(rows.inputs, "tobytes"):
                digest.update(rows.inputs.tobytes())
                continue
            for item in rows.inputs:
                digest.update(repr(item).encode("utf-8", "surrogatepass"))
                if isinstance(item, Path):
                    digest.update(repr((item.stat().st_size, item.stat().st_mtime_ns)).encode())
        return digest.hexdigest()


class Split:
    """Rows as batches `(inputs, labels)`, with labels in the form of the task's loss."""

    def __init__(self, task: Task, rows: Rows, encode: Encode) -> None:
        self.task, self.rows, self.encode = task, rows, encode

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int], pad_to: int | None = None) -> tuple[Inputs, Tensor]:
        """The rows at `indices` as one batch."""
        return self.task.collate(self.encode_rows(indices, pad_to), self.rows.labels_at(indices))

    def encode_rows(self, indices: Sequence[int], pad_to: int | None = None) -> Inputs:
        """The rows at `indices`, encoded."""
        return self.encode(self.rows.take(indices), pad_to)

    def pad_to(self, max_length: int) -> int | None:
        """Tokens per row in a program's shape; `None` for images, which have one shape."""
        return max_length if self.task.texts else None

    def one_row(self, index: int, max_length: int) -> Inputs:
        """One row in a program's shape: texts padded to `max_length`, images unchanged."""
        return self.batch([index], self.pad_to(max_length))[0]

    def batches(self, batch_size: int) -> Iterator[tuple[Inputs, Tensor]]:
        """All rows in order; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            yield self.batch(range(start, min(start + batch_size, len(self))))

    @cached_property
    def lengths(self) -> tuple[int, ...] | None:
        """Tokens of each row after truncation, to batch rows of similar length; `None` if rows are not texts."""
        if not self.task.texts or len(self) == 0:
            return None
        lengths: list[int] = []
        for start in range(0, len(self), 512):
            inputs = self.encode_rows(range(start, min(start + 512, len(self))))
            if not isinstance(inputs, dict) or "attention_mask" not in inputs:
                return None
            lengths.extend(inputs["attention_mask"].sum(1).tolist())
        return tuple(lengths)


def cache_folder() -> Path:
    """The folder for converted models and downloaded data: `edgetune` in `XDG_CACHE_HOME`, or in `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "edgetune"


def data_error(
    message: str, *, got: object = None, allowed: Sequence[str] = (), action: str = "", near: str | None = None
) -> EdgetuneError:
    """An error about the data, with exit code 3."""
    return EdgetuneError(message, got=got, allowed=allowed, action=action, near=near, exit_code=Exit.DATA)


class BadRows:
    """Collects rows that cannot be read, and raises if there are too many."""

    def __init__(self, max_bad_rows_pct: float) -> None:
        self.max_bad_rows_pct = max_bad_rows_pct
        self.rows: list[tuple[str, str]] = []  # place, reason

    def add(self, place: str, reason: str) -> None:
        """Add a row by its location: "row 12" (as an editor counts) or a path."""
        self.rows.append((place, reason))

    def notes(self, total: int, source: str, reason: str = "cannot be read") -> tuple[str, ...]:
        """A note about the skipped rows, or `EdgetuneError` if they exceed the limit. `total` includes bad rows."""
        if not self.rows:
            return ()
        share = 100 * len(self.rows) / max(total, 1)
        first = self._by_reason()
        if share > self.max_bad_rows_pct:
            action = "fix these rows, or raise data.max_bad_rows_pct"
            if sum(reason == NOT_UTF8 for _, reason in self.rows) > len(self.rows) / 2:
                action = "save the file as UTF-8; it is probably in Latin-1 or Windows-1252"
            raise data_error(
                f"{source}: {len(self.rows):,} of {total:,} rows {reason} "
                f"({share:{'.0f' if share >= 10 else '.2g'}} %, allowed {self.max_bad_rows_pct:g} %): {first}",
                action=action,
            )
        return (f"left out {len(self.rows):,} of {total:,} rows that {reason}: {first}",)

    def _by_reason(self, most: int = 5) -> str:
        """Each reason once, with the first location: "row 12 and 3 more: empty text"."""
        places: dict[str, list[str]] = {}
        for place, reason in self.rows:
            places.setdefault(reason, []).append(place)
        listed = [
            f"{first}{f' and {len(more):,} more' if more else ''}: {reason}"
            for reason, (first, *more) in places.items()
        ]
        return "; ".join(
            [*listed[:most], *([f"and {len(listed) - most:,} more reasons"] if len(listed) > most else [])]
        )


def split_indices(
    keys: Sequence[str], labels: Sequence[int] | None, settings: DataSettings, parts: tuple[str, ...]
) -> tuple[list[int], ...]:
    """Indices of the training rows, then of each of `parts` ("test", "validation"), by their percentages.

    Depends on the contents alone, not on their order or on a seed. Rows with the same key stay together, so that a
    duplicate is never in two parts. Classes are spread evenly, and each keeps at least one row for training.
    Each list is in a pseudo-random order, so that its first rows are a fair sample.
    """
    if settings.whole:
        holder = "test" if "test" in parts else "train"
        return tuple(list(range(len(keys))) if part == holder else [] for part in ("train", *parts))
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest(), []).append(index)
    label = {k: 0 if labels is None else min(labels[i] for i in indices) for k, indices in groups.items()}
    left = sorted(groups, key=lambda k: (label[k], k))
    kept = [k for n, k in enumerate(left) if n == 0 or label[left[n - 1]] != label[k]]
    left = sorted(set(left) - set(kept), key=lambda k: (label[k], k))
    chosen: list[list[str]] = []
    for part in parts:
        wanted = round(len(groups) * (settings.test_pct if part == "test" else settings.validation_pct) / 100)
        if not 0 < wanted <= len(left):
            lacking = part if wanted < 1 else "training"
            several = "different rows leave" if len(groups) != 1 else "different row leaves"
            action = "give more rows, or change data.test_pct and data.validation_pct"
            share = settings.test_pct if part == "test" else settings.validation_pct
            if share < 1:
                action = f"data.{part}_pct is a percentage: write {100 * share:g} for {share:g}"
            raise data_error(f"too few rows to split: {len(groups)} {several} no {lacking} rows", action=action)
        taken = {left[(2 * n + 1) * len(left) // (2 * wanted)] for n in range(wanted)}
        chosen.append([k for k in left if k in taken])
        left = [k for k in left if k not in taken]
    return tuple([i for k in sorted(part) for i in groups[k]] for part in (kept + left, *chosen))


def complete_parts(keys: Sequence[str], train: Rows, settings: DataSettings, **others: Rows) -> tuple[Rows, Rows, Rows]:
    """Training, validation and test rows; parts that are not given are split off `train` by its keys."""
    missing = tuple(part for part in ("test", "validation") if part not in others)
    kept, *split_off = split_indices(keys, train.classes, settings, missing)
    parts = others | {part: train.subset(indices) for part, indices in zip(missing, split_off, strict=True)}
    return train.subset(kept), parts["validation"], parts["test"]


def assemble(
    name: str,
    task: Task,
    parts: tuple[Rows, Rows, Rows],
    settings: DataSettings,
    notes: Sequence[str] = (),
) -> Dataset:
    """A data set of three parts, limited to the numbers of rows in the settings, after the last checks."""
    cut = []
    for part, rows in zip(("train", "validation", "test"), parts, strict=True):
        limit: int | None = getattr(settings, f"{part}_rows")
        if not len(rows) and not settings.whole:
            raise data_error(f"{name}: there are no {part} rows", action="give more rows, or change the split")
        if limit is not None and limit > len(rows):
            raise data_error(
                f"{name}: data.{part}_rows exceeds the number of rows",
                got=limit,
                action=f"use at most {len(rows)}, or leave data.{part}_rows out",
            )
        cut.append(rows if limit is None else rows.subset(range(limit)))
    train, validation, test = cut
    if not settings.whole:
        task.check(name, train, (validation, test))
    return Dataset(name, task.fit(train), train, validation, test, tuple(notes))


def classes_of(labels: Sequence[str]) -> tuple[str, ...]:
    """The classes in order: by number if all are integers, else by name.

    >>> classes_of(["10", "9", "9"]), classes_of(["b", "a"])
    (('9', '10'), ('a', 'b'))
    """
    names = set(labels)
    numbers = all(label.lstrip("-").isdecimal() and label.count("-") < 2 for label in names)
    order: Callable[[str], Any] = (lambda label: (int(label), label)) if numbers else str
    return tuple(sorted(names, key=order))
