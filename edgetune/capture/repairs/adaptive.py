"""Adaptive pooling without a kernel: window by window, since they differ in size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from edgetune.capture.repairs.shapes import Repaired, is_fixed

_MOST = 256  # windows: each is several operators


def average(x: Tensor, output_size: Sequence[int]) -> Repaired:
    """The mean of each window of a volume, one dim after the other."""
    if not is_fixed(x) or not x.dtype.is_floating_point:
        return NotImplemented
    return _along(x, output_size, lambda part, dim: part.mean(dim, keepdim=True))


def largest(x: Tensor, output_size: Sequence[int]) -> Repaired:
    """The largest value of each window, and its index, which is only computed if it is read."""
    if not is_fixed(x) or prod(output_size) > _MOST:
        return NotImplemented
    return _along(x, output_size, lambda part, dim: part.amax(dim, keepdim=True)), _places(x, output_size)


def _windows(size: int, count: int) -> list[tuple[int, int]]:
    return [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def _along(x: Tensor, output_size: Sequence[int], pool: Callable[[Tensor, int], Tensor]) -> Tensor:
    rank = len(output_size)
    for dim, count in zip(range(x.dim() - rank, x.dim()), output_size, strict=True):
        if count == x.shape[dim]:
            continue
        parts = [pool(x.narrow(dim, begin, end - begin), dim) for begin, end in _windows(x.shape[dim], count)]
        x = torch.cat(parts, dim) if count > 1 else parts[0]
    return x


def _places(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """The indices in the whole tensor, from those in each window."""
    rank = len(output_size)
    sizes, kept = list(x.shape[-rank:]), list(x.shape[:-rank])
    numbers = torch.arange(prod(sizes)).reshape(sizes)
    indices = []
    for window in product(*(_windows(size, count) for size, count in zip(sizes, output_size, strict=True))):
        part, own = x, numbers
        for place, (begin, end) in enumerate(window):
            part = part.narrow(len(kept) + place, begin, end - begin)
            own = own.narrow(place, begin, end - begin)
        best = part.reshape(*kept, -1).argmax(-1)
        indices.append(own.reshape(-1)[best])
    return torch.stack(indices, -1).reshape(*kept, *output_size)


_ATEN = torch.ops.aten
REPAIRS: dict[Any, Any] = {
    _ATEN.adaptive_avg_pool3d.default: average,
    _ATEN.adaptive_max_pool1d.default: largest,
    _ATEN.adaptive_max_pool2d.default: largest,
    _ATEN.adaptive_max_pool3d.default: largest,
}
