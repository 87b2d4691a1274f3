"""Entities in tagged words: parsing of IOB2 tags such as `B-person I-person O`, and their F1."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

OUTSIDE = "O"
_TAG = re.compile(r"O|[BI]-.+")


class Entity(NamedTuple):
    """The words from `start` up to, not including, `end`, of one kind."""

    kind: str
    start: int
    end: int


def is_tag(tag: str) -> bool:
    """Whether a tag is one of IOB2: `O`, `B-kind` or `I-kind`."""
    return bool(_TAG.fullmatch(tag))


def tags_in_order(tags: Iterable[str]) -> tuple[str, ...]:
    """Each tag once: `O`, then by kind, `B-` before `I-`.

    >>> tags_in_order(["I-place", "O", "B-person", "B-place"])
    ('O', 'B-person', 'B-place', 'I-place')
    """
    return tuple(sorted({OUTSIDE, *tags}, key=lambda tag: (tag != OUTSIDE, tag[2:], tag)))


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities in the tags of a text's words, parsed as IOB2 like seqeval and conlleval.

    `B-` always begins one; so does an `I-` that does not follow its kind.

    >>> [tuple(entity) for entity in entities(["B-a", "I-a", "B-a", "I-b", "O"])]
    [('a', 0, 2), ('a', 2, 3), ('b', 3, 4)]
    """
    read: list[Entity] = []
    for place, tag in enumerate(tags):
        kind, last = tag[2:], read[-1] if read else None
        if tag == OUTSIDE:
            continue
        if tag.startswith("I-") and last is not None and last.end == place and last.kind == kind:
            read[-1] = last._replace(end=place + 1)
        else:
            read.append(Entity(kind, place, place + 1))
    return read


def entity_f1_pct(true: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]) -> float:
    """The micro-averaged F1 of whole entities in per cent; 0 if there are none at all, as in seqeval."""
    right = counted = 0
    for tags, others in zip(true, predicted, strict=True):
        ours, theirs = set(entities(tags)), set(entities(others))
        right += len(ours & theirs)
        counted += len(ours) + len(theirs)
    return 200 * right / counted if counted else 0.0
