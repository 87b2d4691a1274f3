"""Splitting, selecting and rolling as slices without a stride, which XNNPACK takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edgetune.capture.repairs.shapes import Repaired, takes


def split_with_sizes(x: Tensor, split_sizes: Sequence[int], dim: int = 0) -> Repaired:
    """Slices of the given widths."""
    if not takes(x):
        return NotImplemented
    parts, start = [], 0
    for size in split_sizes:
        parts.append(x.narrow(dim, start, size))
        start += size
    return parts


def split(x: Tensor, split_size: int, dim: int = 0) -> Repaired:
    """Slices of one width; the last may be narrower."""
    if not takes(x) or split_size < 1:
        return NotImplemented
    width = x.shape[dim]
    return [x.narrow(dim, start, min(split_size, width - start)) for start in range(0, width, split_size)]


def select(x: Tensor, dim: int, index: int) -> Repaired:
    """One place of a dim, as a slice without that dim."""
    if not takes(x) or not isinstance(index, int):
        return NotImplemented
    dim %= x.dim()
    form = [size for d, size in enumerate(x.shape) if d != dim]
    return x.narrow(dim, index % x.shape[dim], 1).reshape(form)


def unbind(x: Tensor, dim: int = 0) -> Repaired:
    """Every place of a dim."""
    if not takes(x):
        return NotImplemented
    return [select(x, dim, index) for index in range(x.shape[dim])]


def roll(x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Repaired:
    """Swap both parts of each dim."""
    if not takes(x) or len(shifts) != len(dims):
        return NotImplemented
    for shift, dim in zip(shifts, dims):  # noqa: B905  their lengths were compared
        width = x.shape[dim]
        cut = (width - shift) % width
        if cut:
            x = torch.cat([x.narrow(dim, cut, width - cut), x.narrow(dim, 0, cut)], dim)
    return x


_ATEN = torch.ops.aten
REPAIRS: dict[Any, Any] = {
    _ATEN.split_with_sizes.default: split_with_sizes,
    _ATEN.split.Tensor: split,
    _ATEN.select.int: select,
    _ATEN.unbind.int: unbind,
    _ATEN.roll.default: roll,
}
