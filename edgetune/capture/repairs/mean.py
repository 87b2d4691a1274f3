"""Means, sums, variances and norms as means of four dims over the last two, which XNNPACK takes.

A mean over the last dims becomes one of a view `(rows, 1, 1, width)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from edgetune.capture.repairs.shapes import Repaired, dims_of, takes


def mean(x: Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Repaired:
    """The mean over any dims, by way of one over the last two of four."""
    if not takes(x) or dtype not in (None, x.dtype) or x.numel() == 0 or x.dim() == 0:
        return NotImplemented
    dims = dims_of(dim, x.dim())
    if x.dim() == 4 and dims == (2, 3) and keepdim and dtype is None:
        return NotImplemented
    kept = [d for d in range(x.dim()) if d not in dims]
    final = [1 if d in dims else size for d, size in enumerate(x.shape)] if keepdim else [x.shape[d] for d in kept]
    if all(x.shape[d] == 1 for d in dims):
        return x.reshape(final)
    return _pool(x, kept, dims).reshape(final)


def _pool(x: Tensor, kept: list[int], dims: tuple[int, ...]) -> Repaired:
    rows = [x.shape[d] for d in kept]
    order = [*kept, *dims]
    if order == sorted(order):  # the last dims: a row of memory each
        four = x if x.dim() == 4 and len(dims) == 2 else x.reshape(prod(rows), 1, 1, -1)
    else:  # as images, whose channels are contiguous in memory
        four = x.permute(order).reshape(rows[0] if rows else 1, prod(rows[1:]), -1, 1)
    return torch.ops.aten.mean.dim(four, [2, 3], True)


def mean_all(x: Tensor, *, dtype: torch.dtype | None = None) -> Repaired:
    """The mean over all dims."""
    return mean(x, None, dtype=dtype)


def total(x: Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Repaired:
    """The sum as a mean times the number of values."""
    if not takes(x) or dtype not in (None, x.dtype) or x.numel() == 0 or x.dim() == 0:
        return NotImplemented
    count = prod(x.shape[d] for d in dims_of(dim, x.dim()))
    return torch.ops.aten.mean.dim(x, dim, keepdim) * float(count)


def variance(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> Repaired:
    """The mean square of the differences from the mean."""
    if not takes(x) or x.numel() == 0 or x.dim() == 0:
        return NotImplemented
    dims = list(dims_of(dim, x.dim()))
    count = prod(x.shape[d] for d in dims)
    free = count - (1 if correction is None else correction)
    if free <= 0:
        return NotImplemented
    apart = x - torch.ops.aten.mean.dim(x, dims, True)
    return torch.ops.aten.mean.dim(apart * apart, dims, keepdim) * (count / free)


def variance_of(x: Tensor, dim: Sequence[int] | None, unbiased: bool = True, keepdim: bool = False) -> Repaired:
    """The same by the older operator."""
    return variance(x, dim, correction=1 if unbiased else 0, keepdim=keepdim)


def vector_norm(
    x: Tensor,
    ord: float = 2,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Repaired:
    """The Euclidean norm, or the sum of magnitudes."""
    if ord not in (1, 2) or not takes(x) or dtype not in (None, x.dtype) or x.numel() == 0 or x.dim() == 0:
        return NotImplemented
    summed = torch.ops.aten.sum.dim_IntList(x * x if ord == 2 else torch.abs(x), dim, keepdim)
    return torch.sqrt(summed) if ord == 2 else summed


_ATEN = torch.ops.aten
REPAIRS: dict[Any, Any] = {
    _ATEN.mean.dim: mean,
    _ATEN.mean.default: mean_all,
    _ATEN.sum.dim_IntList: total,
    _ATEN.var.correction: variance,
    _ATEN.var.dim: variance_of,
    _ATEN.linalg_vector_norm.default: vector_norm,
}
