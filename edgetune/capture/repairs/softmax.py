"""Softmax: over a dim that is not the last, and of images.

XNNPACK takes a softmax over the last of four dims. The output of a convolution has its channels last in memory, and
executorch 1.4 and 1.5 then silently takes the softmax over the channels. A view avoids that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgetune.capture.repairs.shapes import Repaired, takes


def softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Repaired:
    """Over the last dim of a view of three dims at most."""
    if not takes(x) or dtype not in (None, x.dtype) or x.dim() == 0 or x.numel() == 0:
        return NotImplemented
    last = dim % x.dim() == x.dim() - 1
    if last and x.dim() != 4:
        return NotImplemented
    if not last:
        return torch.softmax(x.transpose(dim, -1), -1).transpose(dim, -1)
    return torch.softmax(x.reshape(-1, *x.shape[2:]), -1).reshape(x.shape)


REPAIRS: dict[Any, Any] = {torch.ops.aten.softmax.int: softmax}
