"""RMSNorm and group norm, by means.

LayerNorm stays one portable operator: a BERT whose layer norms were written as linears was slower, not faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edgetune.export.repairs.shapes import Repaired, takes


def rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Repaired:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dims (Zhang and Sennrich, 2019)."""
    if not takes(x):
        return NotImplemented
    dims = list(range(x.dim() - len(normalized_shape), x.dim()))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    scaled = x * torch.rsqrt(torch.ops.aten.mean.dim(x * x, dims, True) + eps)
    return scaled if weight is None else scaled * weight


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Repaired:
    """Group norm of `(batch, channels, ...)`: each group of channels together gets mean 0 and variance 1."""
    if not takes(x) or x.dim() < 3:
        return NotImplemented
    groups = x.reshape(x.shape[0] * num_groups, 1, 1, -1)
    apart = groups - torch.ops.aten.mean.dim(groups, [2, 3], True)
    scaled = apart * torch.rsqrt(torch.ops.aten.mean.dim(apart * apart, [2, 3], True) + eps)
    found = scaled.reshape(x.shape)
    form = (1, -1, *[1] * (x.dim() - 2))
    found = found if weight is None else found * weight.reshape(form)
    return found if bias is None else found + bias.reshape(form)


_ATEN = torch.ops.aten
REPAIRS: dict[Any, Any] = {_ATEN.rms_norm.default: rms_norm, _ATEN.group_norm.default: group_norm}
