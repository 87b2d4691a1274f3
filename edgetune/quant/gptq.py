"""GPTQ: round a weight column by column, and let the columns that follow make up for each rounding.

Frantar et al., 2022, arXiv:2210.17323, algorithm 1. Columns are rounded in the order of falling activations, with the
scales of all groups chosen beforehand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from edgetune.core.errors import EdgetuneError
from edgetune.quant.rounding import Codes, Grid, mse_scales

_COLUMNS = 128  # whose corrections are applied one by one; those of later columns follow as one product
_DAMPINGS = (0.01, 0.1, 1.0)  # added to the diagonal, as a share of its mean


class Factor(NamedTuple):
    """What rounding needs of the inputs of a layer."""

    order: Tensor  # the inputs in the order in which their columns are rounded
    inverse: Tensor  # `(in, in)`, upper: U with U'U the inverse of the damped Hessian in that order


def factor_hessian(hessian: Tensor, layer: str) -> Factor:
    """Factor the sum of x x' over the inputs `(in, in)` of a layer. Raises `EdgetuneError` if no damping helps.

    An input that is always zero is rounded to nearest, since it corrects no other and no other corrects it.
    """
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    mean = diagonal.sum() / diagonal.count_nonzero().clamp(min=1)
    ordered = hessian[order][:, order] / mean.clamp(min=torch.finfo(hessian.dtype).smallest_normal)
    for damping in _DAMPINGS:
        damped = ordered + damping * torch.eye(len(order), dtype=ordered.dtype, device=ordered.device)
        # R R' = damped with R upper, by the factor of the reversed matrix; U is the inverse of R
        reversed_factor, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if failed:
            continue
        identity = torch.eye(len(order), dtype=ordered.dtype, device=ordered.device)
        inverse = torch.linalg.solve_triangular(reversed_factor.flip(0, 1), identity, upper=True)
        if bool(torch.isfinite(inverse).all()):
            return Factor(order, inverse)
    raise EdgetuneError(
        f"GPTQ cannot factor the Hessian of a layer, damped by up to {_DAMPINGS[-1]:g} of its mean",
        where=layer,
        action="give more calibration batches, or set algorithm: absmax",
    )


def gptq_codes(weight: Tensor, grid: Grid, factor: Factor) -> Codes:
    """Codes of a weight `(out, in)`. Its rows do not depend on each other."""
    scales = mse_scales(weight, grid)
    columns = weight.float().t()[factor.order]  # (in, out): a column of the weight is contiguous
    scale_of_group = scales.t().contiguous()
    groups = (factor.order // grid.inputs_per_scale(len(columns))).tolist()
    codes = torch.empty_like(columns, dtype=torch.int8)
    for start in range(0, len(columns), _COLUMNS):
        block, inverse = columns[start : start + _COLUMNS], factor.inverse[start : start + _COLUMNS]
        end, errors = start + len(block), torch.empty_like(block)
        pivots = inverse.diagonal(start).tolist()
        for n, column in enumerate(block):
            scale = scale_of_group[groups[start + n]]
            code = grid.round(column / scale)
            codes[start + n] = code
            torch.sub(column, code.mul_(scale), out=errors[n]).div_(pivots[n])
            block[n + 1 :].addr_(inverse[n, start + n + 1 : end], errors[n], alpha=-1)
        columns[end:].addmm_(inverse[:, end:].t(), errors, alpha=-1)
    in_place = torch.empty_like(codes)
    in_place[factor.order] = codes
    return Codes(in_place.t().contiguous(), scales.to(grid.scale_dtype or weight.dtype))
