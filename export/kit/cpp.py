"""The C++ sample's data: a header with values of the manifest and Unicode tables, and the vocabulary as lines."""

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
_SYLLABLES = range(0xAC00, 0xD7A4)  # Korean: decomposed by arithmetic, in text.hpp
_KEPT = {9, 10, 13}  # control characters that are spaces


def fields(manifest: Manifest) -> dict[str, str]:
    """The values for the header's template."""
    carried = manifest.carried
    assert carried is not None
    labels = ", ".join(_quote(label) for label in carried.labels)
    preprocessing = carried.preprocessing
    if isinstance(preprocessing, ImagePreprocessing):
        return {"labels": labels, **_image_fields(preprocessing)}
    assert isinstance(preprocessing, TextPreprocessing)
    assert preprocessing.wordpiece is not None
    return {
        "labels": labels,
        **_token_fields(preprocessing, manifest.main.inputs[0].shape[1]),
        **_wordpiece_fields(preprocessing.wordpiece),
    }


def list_vocabulary(tokenizer: Path) -> str:
    """The tokens of a `tokenizer.json`, one per line in the order of their ids; an unused id is an empty line."""
    ids: dict[str, int] = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
    lines = [""] * (1 + max(ids.values()))
    for token, id_ in ids.items():
        lines[id_] = token
    return "".join(f"{line}\n" for line in lines)


def _image_fields(spec: ImagePreprocessing) -> dict[str, str]:
    return {
        "size_px": str(spec.size_px),
        "grey": _format_bool(spec.color == "grey"),
        "crop_center": _format_bool(spec.crop == "center"),
        "rounded": _format_bool(spec.rounded),
        "scale": _format_float(spec.scale),
        "mean": ", ".join(map(_format_float, spec.mean)),
        "std": ", ".join(map(_format_float, spec.std)),
    }


def _token_fields(spec: TextPreprocessing, width: int) -> dict[str, str]:
    return {
        "tokens": str(width),
        "max_tokens": str(min(width, spec.max_length)),
        "cut_right": _format_bool(spec.cut == "right"),
        "pad": str(spec.pad_id),
        "ending": _quote(spec.ending),
    }


def _wordpiece_fields(spec: WordPiece) -> dict[str, str]:
    kinds = [unicodedata.category(chr(point)) for point in range(0x110000)]
    marks = [p for p, kind in enumerate(kinds) if kind[0] == "P" or (32 < p < 127 and not chr(p).isalnum())]
    spaces = [p for p in range(0x3001) if chr(p).isspace() and not 0x1C <= p <= 0x1F]
    dropped = [p for p, kind in enumerate(kinds) if p == 0xFFFD or (kind[0] == "C" and p not in _KEPT)]
    letters = (p for p, kind in enumerate(kinds) if kind[0] != "C" and p not in _SYLLABLES)
    folds = [(point, text) for point in letters if (text := _fold(chr(point), spec)) != chr(point)]
    return {
        "unknown": str(spec.unknown_id),
        "before": ", ".join(map(str, spec.before)),
        "after": ", ".join(map(str, spec.after)),
        "prefix": _quote(spec.prefix),
        "longest_word": str(spec.longest_word),
        "clean": _format_bool(spec.clean),
        "chinese": _format_bool(spec.chinese),
        "strip_accents": _format_bool(spec.strip_accents),
        "unicode": unicodedata.unidata_version,
        "punctuation": _format_ranges(_group_ranges(marks)),
        "spaces": _format_ranges(_group_ranges(spaces)),
        "dropped": _format_ranges(_group_ranges(dropped)),
        "chinese_characters": _format_ranges(CHINESE),
        # C++ has no empty arrays, so there is a first entry even if the tokenizer folds no letter
        "folds": _format_lines(['{0, U""}', *(f'{{{point:#x}, U"{_escape_points(text)}"}}' for point, text in folds)]),
    }


def _fold(letter: str, spec: WordPiece) -> str:
    if spec.strip_accents:
        decomposed = unicodedata.normalize("NFD", letter)
        letter = "".join(c for c in decomposed if unicodedata.category(c) != "Mn")
    return "".join(c.lower() for c in letter) if spec.lowercase else letter


def _group_ranges(points: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending code points as ranges."""
    ranges: list[tuple[int, int]] = []
    for point in points:
        if ranges and ranges[-1][1] == point - 1:
            ranges[-1] = ranges[-1][0], point
        else:
            ranges.append((point, point))
    return ranges


def _format_ranges(ranges: Iterable[tuple[int, int]]) -> str:
    return _format_lines([f"{{{first:#x}, {last:#x}}}" for first, last in ranges])


def _format_lines(items: Sequence[str]) -> str:
    """Eight per line, between line breaks."""
    rows = [", ".join(items[i : i + 8]) for i in range(0, len(items), 8)]
    return "\n    " + ",\n    ".join(rows) + "\n"


def _escape_points(text: str) -> str:
    return "".join(f"\\U{ord(c):08x}" if ord(c) > 0x9F else c for c in text)


def _quote(text: str) -> str:
    """A C++ literal of UTF-8 bytes; octal escapes have a fixed length."""
    plain = {ord('"'), ord("\\"), ord("?")}
    body = "".join(chr(b) if 32 <= b < 127 and b not in plain else f"\\{b:03o}" for b in text.encode())
    return f'"{body}"'


def _format_float(value: float) -> str:
    return f"{value!r}f"


def _format_bool(value: bool) -> str:
    return "true" if value else "false"
