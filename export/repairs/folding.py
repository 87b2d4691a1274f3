"""What has no kernel and is a convolution or a product: `nn.Fold` and `nn.Bilinear`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edgetune.export.repairs.shapes import Repaired, is_fixed


def fold(
    x: Tensor,
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Repaired:
    """Overlapping blocks put back and added up: a transposed convolution, each block's places by a kernel of its own."""
    if x.dim() != 3 or not is_fixed(x) or not x.dtype.is_floating_point:
        return NotImplemented
    sizes = list(zip(output_size, kernel_size, dilation, padding, stride, strict=True))
    counts = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, d, p, s in sizes]
    more = [size - ((n - 1) * s - 2 * p + d * (k - 1) + 1) for n, (size, k, d, p, s) in zip(counts, sizes, strict=True)]
    places = prod(kernel_size)
    channels = x.shape[1] // places
    kernel = torch.eye(places, dtype=x.dtype).reshape(places, 1, *kernel_size)
    blocks = x.reshape(-1, places, *counts)
    whole = F.conv_transpose2d(blocks, kernel, None, stride, padding, 0, 1, dilation)
    whole = F.pad(whole, [0, more[1], 0, more[0]]) if any(more) else whole
    return whole.reshape(-1, channels, *output_size)


def bilinear(left: Tensor, right: Tensor, weight: Tensor, bias: Tensor | None = None) -> Repaired:
    """`left W right` for each output: the product by `left` is a linear layer of all outputs at once."""
    if not is_fixed(left, right):
        return NotImplemented
    outputs, width, other = weight.shape
    flat = weight.permute(0, 2, 1).reshape(outputs * other, width)
    rows = F.linear(left, flat).reshape(*left.shape[:-1], outputs, other)
    found = (rows * right.unsqueeze(-2)).sum(-1)
    return found if bias is None else found + bias


_ATEN = torch.ops.aten
REPAIRS: dict[Any, Any] = {_ATEN.col2im.default: fold, _ATEN.bilinear.default: bilinear}
