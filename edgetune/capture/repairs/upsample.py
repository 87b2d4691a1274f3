"""Enlarging to the nearest by a whole factor: each place several times in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edgetune.capture.repairs.expand import repeat_interleave
from edgetune.capture.repairs.shapes import Repaired, takes


def nearest(x: Tensor, output_size: Sequence[int] | None, scale_factors: Sequence[float] | None) -> Repaired:
    """`(batch, channels, rows, columns)` with each row and each column repeated."""
    if not takes(x) or x.dim() != 4:
        return NotImplemented
    if output_size is not None:
        factors = [size / had for size, had in zip(output_size, x.shape[2:])]  # noqa: B905
    else:
        factors = list(scale_factors or ())
    if len(factors) != 2 or any(f != int(f) or not 1 <= f <= 8 for f in factors):
        return NotImplemented
    for dim, factor in zip((2, 3), factors):  # noqa: B905
        x = repeat_interleave(x, int(factor), dim) if factor > 1 else x
    return x


REPAIRS: dict[Any, Any] = {torch.ops.aten.upsample_nearest2d.vec: nearest}
