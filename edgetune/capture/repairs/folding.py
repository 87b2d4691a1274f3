"""Operators without a kernel as convolutions or products: `nn.Fold`, `nn.Bilinear`, `F.conv_tbc`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edgetune.capture.repairs.shapes import Repaired, is_fixed


def fold(
    x: Tensor,
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Repaired:
    """Overlapping blocks added up: a transposed convolution with a kernel for each place of a block."""
    if x.dim() != 3 or not is_fixed(x) or not x.dtype.is_floating_point:
        return NotImplemented
    sizes = list(zip(output_size, kernel_size, dilation, padding, stride, strict=True))
    counts = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, d, p, s in sizes]
    places = prod(kernel_size)
    channels = x.shape[1] // places
    kernel = torch.eye(places, dtype=x.dtype).reshape(places, 1, *kernel_size)
    blocks = x.reshape(-1, places, *counts)
    whole = F.conv_transpose2d(blocks, kernel, None, stride, 0, 0, 1, dilation)
    for dim, (size, p) in enumerate(zip(output_size, padding, strict=True), 2):
        whole = whole.narrow(dim, p, min(size, whole.shape[dim] - p))
    after = [size - had for size, had in zip(output_size, whole.shape[2:], strict=True)]
    whole = F.pad(whole, [0, after[1], 0, after[0]]) if any(after) else whole
    return whole.reshape(-1, channels, *output_size)


def bilinear(left: Tensor, right: Tensor, weight: Tensor, bias: Tensor | None = None) -> Repaired:
    """`left W right` for each output: the product with `left` is one linear layer for all outputs."""
    if not is_fixed(left, right):
        return NotImplemented
    outputs, width, other = weight.shape
    flat = weight.permute(0, 2, 1).reshape(outputs * other, width)
    rows = F.linear(left, flat).reshape(*left.shape[:-1], outputs, other)
    product = (rows * right.unsqueeze(-2)).sum(-1)
    return product if bias is None else product + bias


def conv_tbc(x: Tensor, weight: Tensor, bias: Tensor, pad: int = 0) -> Repaired:
    """A convolution over time whose rows are (time, batch, channels)."""
    return F.conv1d(x.permute(1, 2, 0), weight.permute(2, 1, 0), bias, padding=pad).permute(2, 0, 1)


_ATEN = torch.ops.aten
REPAIRS: dict[Any, Any] = {
    _ATEN.col2im.default: fold,
    _ATEN.bilinear.default: bilinear,
    _ATEN.conv_tbc.default: conv_tbc,
}
