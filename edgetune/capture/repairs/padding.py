"""Reflection and edge padding as slices and a concatenation, where the stock form gathers by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edgetune.capture.repairs.shapes import Repaired, is_fixed, takes

_MOST = 8  # per side: each place is an operand


def reflect(x: Tensor, padding: Sequence[int]) -> Repaired:
    """Mirror at the first and the last place, which are not repeated."""
    return _pad_by_slices(x, padding, mirrored=True)


def replicate(x: Tensor, padding: Sequence[int]) -> Repaired:
    """Repeat the first and the last place."""
    return _pad_by_slices(x, padding, mirrored=False)


def pad(x: Tensor, padding: Sequence[int], mode: str = "constant", value: float | None = None) -> Repaired:
    """Any of them by its name."""
    if mode == "constant":
        return constant(x, padding, value)
    return (
        _pad_by_slices(x, padding, mirrored=mode == "reflect") if mode in ("reflect", "replicate") else NotImplemented
    )


def constant(x: Tensor, padding: Sequence[int], value: float | None = None) -> Repaired:
    """Crop by negative paddings, which the kernel does not take."""
    if not is_fixed(x) or not any(isinstance(p, int) and p < 0 for p in padding):
        return NotImplemented
    for place in range(len(padding) // 2):
        dim, before, after = x.dim() - 1 - place, *(max(0, -p) for p in padding[2 * place : 2 * place + 2])
        x = x.narrow(dim, before, x.shape[dim] - before - after) if before or after else x
    rest = [max(0, p) for p in padding]
    return torch.nn.functional.pad(x, rest, value=value) if any(rest) else x


def crop(x: Tensor, padding: Sequence[int], mode: str = "constant", value: float | None = None) -> Repaired:
    """The same by its name."""
    return constant(x, padding, value) if mode == "constant" else NotImplemented


def _pad_by_slices(x: Tensor, padding: Sequence[int], *, mirrored: bool) -> Repaired:
    if not takes(x) or not all(isinstance(p, int) and 0 <= p <= _MOST for p in padding):
        return NotImplemented
    for place in range(len(padding) // 2):
        dim, before, after = x.dim() - 1 - place, padding[2 * place], padding[2 * place + 1]
        last = x.shape[dim] - 1
        first = [x.narrow(dim, i if mirrored else 0, 1) for i in range(before, 0, -1)]
        final = [x.narrow(dim, last - i if mirrored else last, 1) for i in range(1, after + 1)]
        x = torch.cat([*first, x, *final], dim) if before or after else x
    return x


_ATEN = torch.ops.aten
WITHOUT_KERNEL: dict[Any, Any] = {_ATEN.pad.default: crop, _ATEN.constant_pad_nd.default: constant}
REPAIRS: dict[Any, Any] = {
    _ATEN.pad.default: pad,
    _ATEN.reflection_pad1d.default: reflect,
    _ATEN.reflection_pad2d.default: reflect,
    _ATEN.replication_pad1d.default: replicate,
    _ATEN.replication_pad2d.default: replicate,
}
