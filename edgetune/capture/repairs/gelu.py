"""GELU in its tanh form.

XNNPACK only has the exact GELU, which executorch silently uses for the tanh form too: a difference of up to 5e-4.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from edgetune.capture.repairs.shapes import Repaired


def gelu(x: Tensor, *, approximate: str = "none") -> Repaired:
    """`x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`; the exact form stays."""
    if approximate != "tanh":
        return NotImplemented
    inner = math.sqrt(2 / math.pi) * x * (x * x * 0.044715 + 1.0)
    return x * 0.5 * (torch.tanh(inner) + 1.0)


REPAIRS: dict[Any, Any] = {torch.ops.aten.gelu.default: gelu}
