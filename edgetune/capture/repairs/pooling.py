"""Pooling: XNNPACK's average never counts the padding, and needs whole windows and four dims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgetune.capture.repairs.shapes import Repaired, takes


def average(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Repaired:
    """An average that counts the padding, as one over a padded image."""
    kernel, step, edge = _pair(kernel_size), _pair(stride or kernel_size), _pair(padding)
    if not takes(x) or x.dim() != 4 or divisor_override is not None:
        return NotImplemented
    whole = all((n + 2 * p - k) % s == 0 for n, p, k, s in zip(x.shape[2:], edge, kernel, step))  # noqa: B905
    if (ceil_mode and not whole) or (not count_include_pad and not ceil_mode):
        return NotImplemented
    if count_include_pad and any(edge):
        x, edge = functional.pad(x, [edge[1], edge[1], edge[0], edge[0]]), [0, 0]
    return torch.ops.aten.avg_pool2d.default(x, kernel, step, edge, False, False)


def adaptive_average(x: Tensor, output_size: Sequence[int]) -> Repaired:
    """One window per output if the sizes divide; a mean if there is one output."""
    if not takes(x) or x.dim() != 4:
        return NotImplemented
    rows, columns = output_size
    if (rows, columns) == (1, 1):
        return torch.ops.aten.mean.dim(x, [2, 3], True)
    if x.shape[2] % rows or x.shape[3] % columns:
        return NotImplemented
    window = [x.shape[2] // rows, x.shape[3] // columns]
    return torch.ops.aten.avg_pool2d.default(x, window, window, [0, 0], False, False)


def largest(x: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Repaired:
    """The largest value of an image, as a pool over all of it."""
    dims = sorted(d % x.dim() for d in dim)
    if not takes(x) or x.dim() != 4 or dims != [2, 3]:
        return NotImplemented
    window = list(x.shape[2:])
    pooled = torch.ops.aten.max_pool2d.default(x, window, window)
    return pooled if keepdim else pooled.reshape(x.shape[:2])


def largest_and_place(x: Tensor, dim: int, keepdim: bool = False) -> Repaired:
    """With four dims, which XNNPACK's partitioner takes but its compiler refuses: two operators."""
    if not takes(x) or x.dim() != 4:
        return NotImplemented
    return torch.amax(x, [dim], keepdim), torch.argmax(x, dim, keepdim)


def _pair(value: Sequence[int]) -> list[int]:
    return [value[0], value[0]] if len(value) == 1 else list(value)


_ATEN = torch.ops.aten
REPAIRS: dict[Any, Any] = {
    _ATEN.avg_pool2d.default: average,
    _ATEN.adaptive_avg_pool2d.default: adaptive_average,
    _ATEN.amax.default: largest,
    _ATEN.max.dim: largest_and_place,
}
