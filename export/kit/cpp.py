"""What the C++ sample goes by: a header made of the manifest, and the vocabulary as lines.

C++ has neither JSON nor the tables of Unicode.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from edgetune.program.carried import ImagePreprocessing, TextPreprocessing, WordPiece
from edgetune.program.manifest import Manifest

CHINESE = (
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF), (0x2F800, 0x2FA1F),
)  # fmt: skip
_SYLLABLES = range(0xAC00, 0xD7A4)  # Korean: taken apart by arithmetic, in text.hpp
_KEPT = {9, 10, 13}  # control characters that are blanks


def fields(manifest: Manifest) -> dict[str, str]:
    """The values of the header's template."""
    carried = manifest.carried
    assert carried is not None
    labels = ", ".join(_text(label) for label in carried.labels)
    told = carried.preprocessing
    if isinstance(told, ImagePreprocessing):
        return {"labels": labels, **_picture(told)}
    assert isinstance(told, TextPreprocessing)
    assert told.wordpiece is not None
    return {"labels": labels, **_tokens(told, manifest.main.inputs[0].shape[1]), **_wordpiece(told.wordpiece)}


def vocabulary(tokenizer: Path) -> str:
    """The tokens of a `tokenizer.json`, one a line in the order of their ids; empty where an id has none."""
    known: dict[str, int] = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
    lines = [""] * (1 + max(known.values()))
    for token, place in known.items():
        lines[place] = token
    return "".join(f"{line}\n" for line in lines)


def _picture(told: ImagePreprocessing) -> dict[str, str]:
    return {
        "size_px": str(told.size_px),
        "grey": _bool(told.color == "grey"),
        "crop_center": _bool(told.crop == "center"),
        "rounded": _bool(told.rounded),
        "scale": _float(told.scale),
        "mean": ", ".join(map(_float, told.mean)),
        "std": ", ".join(map(_float, told.std)),
    }


def _tokens(told: TextPreprocessing, width: int) -> dict[str, str]:
    return {
        "tokens": str(width),
        "max_tokens": str(min(width, told.max_length)),
        "cut_right": _bool(told.cut == "right"),
        "pad": str(told.pad_id),
        "ending": _text(told.ending),
    }


def _wordpiece(told: WordPiece) -> dict[str, str]:
    kinds = [unicodedata.category(chr(point)) for point in range(0x110000)]
    marks = [p for p, kind in enumerate(kinds) if kind[0] == "P" or (32 < p < 127 and not chr(p).isalnum())]
    spaces = [p for p in range(0x3001) if chr(p).isspace() and not 0x1C <= p <= 0x1F]
    dropped = [p for p, kind in enumerate(kinds) if p == 0xFFFD or (kind[0] == "C" and p not in _KEPT)]
    letters = (p for p, kind in enumerate(kinds) if kind[0] != "C" and p not in _SYLLABLES)
    folds = [(point, text) for point in letters if (text := _folded(chr(point), told)) != chr(point)]
    return {
        "unknown": str(told.unknown_id),
        "before": ", ".join(map(str, told.before)),
        "after": ", ".join(map(str, told.after)),
        "prefix": _text(told.prefix),
        "longest_word": str(told.longest_word),
        "clean": _bool(told.clean),
        "chinese": _bool(told.chinese),
        "strip_accents": _bool(told.strip_accents),
        "unicode": unicodedata.unidata_version,
        "punctuation": _ranges(_together(marks)),
        "spaces": _ranges(_together(spaces)),
        "dropped": _ranges(_together(dropped)),
        "chinese_characters": _ranges(CHINESE),
        # C++ has no empty arrays: the first entry stands there for a tokenizer that changes no letter
        "folds": _lines(['{0, U""}', *(f'{{{point:#x}, U"{_points(text)}"}}' for point, text in folds)]),
    }


def _folded(letter: str, told: WordPiece) -> str:
    if told.strip_accents:
        apart = unicodedata.normalize("NFD", letter)
        letter = "".join(c for c in apart if unicodedata.category(c) != "Mn")
    return "".join(c.lower() for c in letter) if told.lowercase else letter


def _together(points: Iterable[int]) -> list[tuple[int, int]]:
    """Rising code points as ranges."""
    found: list[tuple[int, int]] = []
    for point in points:
        if found and found[-1][1] == point - 1:
            found[-1] = found[-1][0], point
        else:
            found.append((point, point))
    return found


def _ranges(ranges: Iterable[tuple[int, int]]) -> str:
    return _lines([f"{{{first:#x}, {last:#x}}}" for first, last in ranges])


def _lines(items: Sequence[str]) -> str:
    """Eight to a line, between line breaks."""
    rows = [", ".join(items[i : i + 8]) for i in range(0, len(items), 8)]
    return "\n    " + ",\n    ".join(rows) + "\n"


def _points(text: str) -> str:
    return "".join(f"\\U{ord(c):08x}" if ord(c) > 0x9F else c for c in text)


def _text(text: str) -> str:
    """A C++ literal of UTF-8 bytes; octal escapes end by themselves."""
    plain = {ord('"'), ord("\\"), ord("?")}
    body = "".join(chr(b) if 32 <= b < 127 and b not in plain else f"\\{b:03o}" for b in text.encode())
    return f'"{body}"'


def _float(value: float) -> str:
    return f"{value!r}f"


def _bool(value: bool) -> str:
    return "true" if value else "false"
