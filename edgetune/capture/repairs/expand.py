"""Repeated tensors (grouped-query attention, broadcasts) as concatenations, which XNNPACK takes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from edgetune.capture.repairs.shapes import Repaired, takes

_MOST = 16  # copies: beyond that the concatenation has more operands than it saves


def expand(x: Tensor, size: Sequence[int], *, implicit: bool = False) -> Repaired:
    """`x` repeated along its dims of size 1 to `size`, where -1 keeps a dim as it is."""
    if not takes(x) or not all(isinstance(wanted, int) for wanted in size):
        return NotImplemented
    given = (1,) * (len(size) - x.dim()) + tuple(x.shape)
    wanted = [had if want == -1 else want for want, had in zip(size, given)]  # noqa: B905  of one length
    times = [want // had if had else 1 for want, had in zip(wanted, given)]  # noqa: B905
    if (prod(times) == 1 and len(size) == x.dim()) or prod(times) > _MOST:
        return NotImplemented
    return _tile(x.reshape(given), times)


def repeat(x: Tensor, repeats: Sequence[int]) -> Repaired:
    """`x` written `repeats` times along each dim."""
    if not takes(x) or not all(isinstance(times, int) for times in repeats) or not 1 < prod(repeats) <= _MOST:
        return NotImplemented
    return _tile(x.reshape((1,) * (len(repeats) - x.dim()) + tuple(x.shape)), list(repeats))


def repeat_interleave(x: Tensor, repeats: int, dim: int | None = None, *, output_size: int | None = None) -> Repaired:
    """Each place of a dim `repeats` times in a row."""
    if not takes(x) or not isinstance(repeats, int) or dim is None or not 2 <= repeats <= _MOST:
        return NotImplemented
    dim %= x.dim()
    form = [*x.shape[: dim + 1], 1, *x.shape[dim + 1 :]]
    final = [*x.shape[:dim], x.shape[dim] * repeats, *x.shape[dim + 1 :]]
    return torch.cat(_copies(x.reshape(form), repeats), dim + 1).reshape(final)


def _tile(x: Tensor, times: list[int]) -> Tensor:
    for dim, count in enumerate(times):
        x = torch.cat(_copies(x, count), dim) if count > 1 else x
    return x


def _copies(x: Tensor, count: int) -> list[Tensor]:
    """Copies of a tensor, the last one computed: XNNPACK refuses a concatenation of a single tensor."""
    return [*[x] * (count - 1), x * 1.0]


_ATEN = torch.ops.aten
REPAIRS: dict[Any, Any] = {
    _ATEN.expand.default: expand,
    _ATEN.repeat.default: repeat,
    _ATEN.repeat_interleave.self_int: repeat_interleave,
}
