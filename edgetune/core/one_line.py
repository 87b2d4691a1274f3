"""Values with a short `repr`: a manifest with a thousand operators is one line in a session."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

MOST_LETTERS = 100


class OneLine(BaseModel):
    """A base whose `repr` and `str` are one short line: numbers and names in full, collections by their length."""

    def __repr__(self) -> str:
        text = ""
        for part in _parts(self):
            if len(text) + len(part) > MOST_LETTERS:
                text += ", ..."
                break
            text += f", {part}" if text else part
        return f"{type(self).__name__}({text})"

    __str__ = __repr__


class Entry(OneLine):
    """Base of everything in the ledger: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _parts(value: BaseModel) -> Iterator[str]:
    for name in type(value).model_fields:
        field: Any = getattr(value, name)
        if isinstance(field, float):
            yield f"{name}={field:.6g}"
        elif isinstance(field, str):
            if field:
                yield f"{name}={field if len(field) <= 32 else field[:12] + '...'!r}"
        elif isinstance(field, tuple) and len(field) <= 4 and all(type(item) in (int, float) for item in field):
            yield f"{name}={field}"
        elif isinstance(field, (Sequence, Mapping)):
            if field:
                yield f"{len(field)} {name}"
        elif field is not None and not isinstance(field, BaseModel):
            yield f"{name}={field!r}"
