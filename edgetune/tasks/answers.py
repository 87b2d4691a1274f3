"""A classifier's predictions on labelled rows, counted by class, with its most confident mistakes."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.core.ledger import Answers, ClassFigures, Confusion, Mistake
from edgetune.data.rows import Rows

MOST_CONFUSIONS = 200  # a matrix of 14 classes is whole; beyond, the rarest are left out
MOST_MISTAKES = 10
MOST_CHARACTERS = 200  # of a text
THUMBNAIL_PX = 64


def count_answers(classes: Sequence[str], rows: Rows, logits: Tensor, *, images: bool = False) -> Answers:
    """Figures per class, confusions and mistakes from labelled rows and their logits `(rows, classes)`."""
    scores = logits.float().softmax(1)
    sureness, predicted = scores.max(1)
    true = torch.tensor([int(label) for label in rows.labels or ()], dtype=torch.int64)
    cells = Counter(zip(true.tolist(), predicted.tolist(), strict=True))
    figures = tuple(
        ClassFigures(
            name=name,
            rows=int((true == place).sum()),
            predicted=int((predicted == place).sum()),
            right=cells[place, place],
        )
        for place, name in enumerate(classes)
    )
    wrong = sorted((-count, cell) for cell, count in cells.items() if cell[0] != cell[1])
    confusions = tuple(
        Confusion(true=classes[one], predicted=classes[other], rows=-count)
        for count, (one, other) in wrong[:MOST_CONFUSIONS]
    )
    order = sorted((predicted != true).nonzero().flatten().tolist(), key=lambda row: (-float(sureness[row]), row))
    mistakes = tuple(
        Mistake(
            row=row,
            true=classes[int(true[row])],
            predicted=classes[int(predicted[row])],
            confidence_pct=100 * float(sureness[row]),
            **_preview_row(rows.inputs[row], images=images),
        )
        for row in order[:MOST_MISTAKES]
    )
    return Answers(classes=figures, confusions=confusions, mistakes=mistakes)


def _preview_row(row: Any, *, images: bool) -> dict[str, str]:
    if images:
        return {"text": Path(row).name if isinstance(row, (str, Path)) else "", "image": _thumbnail(row)}
    text = " ".join(row.split())
    return {"text": text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"}


def _thumbnail(source: Any) -> str:
    """The image in a file or an array of bytes, as a `data:` URI of at most 64 pixels a side."""
    from PIL import Image, ImageOps

    if isinstance(source, (str, Path)):
        with Image.open(source) as opened:
            opened.draft("RGB", (THUMBNAIL_PX, THUMBNAIL_PX))
            image = ImageOps.exif_transpose(opened).convert("RGB")
    else:
        image = Image.fromarray(source)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    file = io.BytesIO()
    small = max(image.size) <= THUMBNAIL_PX // 2  # few pixels: lossless is no larger
    image.save(file, **({"format": "PNG"} if small else {"format": "JPEG", "quality": 70}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
