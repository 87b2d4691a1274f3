"""Operators without a kernel, by torch's own decompositions and by short formulas."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table

from edgetune.capture.repairs.shapes import Repaired


def sort(x: Tensor, dim: int = -1, descending: bool = False) -> Repaired:
    """All of a dim in order, as `topk` of as many as there are."""
    if x.dim() == 0 or not isinstance(x.shape[dim], int):
        return NotImplemented
    return torch.topk(x, x.shape[dim], dim, largest=descending, sorted=True)


def argsort(x: Tensor, dim: int = -1, descending: bool = False) -> Repaired:
    """The places of the values in order."""
    ordered = sort(x, dim, descending)
    return ordered if ordered is NotImplemented else ordered[1]


def exp2(x: Tensor) -> Tensor:
    """`2 ** x`."""
    return torch.exp(x * math.log(2.0))


def fmax(left: Tensor, right: Tensor) -> Tensor:
    """The greater of two, or the one that is a number."""
    return torch.where(torch.isnan(left), right, torch.where(torch.isnan(right), left, torch.maximum(left, right)))


def fmin(left: Tensor, right: Tensor) -> Tensor:
    """The lesser of two, or the one that is a number."""
    return -fmax(-left, -right)


def hypot(left: Tensor, right: Tensor) -> Tensor:
    """`sqrt(left^2 + right^2)`, scaled by the greater against overflow."""
    left, right = left.abs(), right.abs()
    most = torch.maximum(left, right)
    share = torch.minimum(left, right) / most.clamp(min=torch.finfo(most.dtype).tiny)
    return most * torch.sqrt(share * share + 1.0)


def copysign(left: Tensor, right: Tensor) -> Tensor:
    """The magnitude of the first with the sign of the second; a zero counts as positive."""
    return torch.where(right < 0, -left.abs(), left.abs())


def logaddexp(left: Tensor, right: Tensor) -> Tensor:
    """`log(exp(left) + exp(right))` without overflow."""
    return torch.maximum(left, right) + torch.log1p(torch.exp(-(left - right).abs()))


def multilabel_margin_loss(x: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    """The margins between each wanted class and each other; torch 2.13's own decomposition counts what stands behind
    the first -1, too.
    """
    scores, wanted = x.reshape(-1, x.shape[-1]), target.reshape(-1, target.shape[-1])
    count = scores.shape[1]
    places = torch.arange(count)
    ends = torch.where(wanted == -1, places, count).amin(-1, keepdim=True)
    inside = places < ends
    best = torch.gather(scores, 1, torch.where(inside, wanted, 0)).unsqueeze(-1)
    is_wanted = (places == torch.where(inside, wanted, -1).unsqueeze(-1)).any(1)
    margins = (1.0 - best + scores.unsqueeze(1)).clamp(min=0.0)
    counted = torch.logical_and(inside.unsqueeze(-1), torch.logical_not(is_wanted).unsqueeze(1))
    losses: Tensor = (margins * counted.to(x.dtype)).sum((1, 2)) / count
    if reduction == 0:
        return losses.reshape(x.shape[:-1])
    return losses.mean() if reduction == 1 else losses.sum()


_ATEN = torch.ops.aten
_BY_TORCH = (
    _ATEN.ldexp.Tensor, _ATEN.dist.default, _ATEN._euclidean_dist.default,
    _ATEN.addmv.default, _ATEN.upsample_bicubic2d.default, _ATEN.upsample_trilinear3d.default, _ATEN.bucketize.Tensor,
)  # fmt: skip
REPAIRS: dict[Any, Any] = {
    **{operator: decomposition_table[operator] for operator in _BY_TORCH if operator in decomposition_table},
    _ATEN.sort.default: sort,
    _ATEN.argsort.default: argsort,
    _ATEN.exp2.default: exp2,
    _ATEN.fmax.default: fmax,
    _ATEN.fmin.default: fmin,
    _ATEN.hypot.default: hypot,
    _ATEN.copysign.Tensor: copysign,
    _ATEN.logaddexp.default: logaddexp,
    _ATEN.multilabel_margin_loss.default: multilabel_margin_loss,
}
