"""Guess which column of a table is the text, and which the class, from common names."""

from __future__ import annotations

import re
from collections.abc import Iterable

LABELS = ("label", "labels", "class", "category", "target", "sentiment", "topic", "intent", "y")
TEXTS = ("text", "sentence", "review", "comment", "message", "content", "body", "question", "tweet", "utterance")


def likely_column(columns: Iterable[str], names: tuple[str, ...]) -> str | None:
    """The column with one of these names, the likeliest first; else one with such a word in its name.

    >>> likely_column(["id", "Review Text", "Sentiment"], TEXTS), likely_column(["id", "n"], LABELS)
    ('Review Text', None)
    """
    words = {column: re.split(r"[\W_]+", column.casefold()) for column in columns}
    partly = (column for name in names for column in words if name in words[column])
    return named_column(words, names) or next(partly, None)


def named_column(columns: Iterable[str], names: tuple[str, ...]) -> str | None:
    """The column with one of these names, the likeliest first."""
    plain = {column: column.strip().casefold() for column in columns}
    return next((column for name in names for column in plain if plain[column] == name), None)
