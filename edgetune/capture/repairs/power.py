"""Powers: XNNPACK takes a square with a whole exponent, and roots by their own names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgetune.capture.repairs.shapes import Repaired


def power(x: Tensor, exponent: float) -> Repaired:
    """`x ** exponent` for 1, 2, 3, 4, a half and minus a half; any other stays."""
    if not x.dtype.is_floating_point:
        return NotImplemented
    if exponent == 0.5:
        return torch.sqrt(x)
    if exponent == -0.5:
        return torch.rsqrt(x)
    if exponent not in (1, 2, 3, 4):
        return NotImplemented
    square = x * x if exponent > 1 else x
    return square * square if exponent == 4 else square * x if exponent == 3 else square


REPAIRS: dict[Any, Any] = {torch.ops.aten.pow.Tensor_Scalar: power}
