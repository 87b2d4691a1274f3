"""Round a weight to integers: grids of codes, symmetric around zero, and their scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_FACTORS = tuple(n / 64 for n in range(38, 74))  # of the absmax scale: 0.59 to 1.14


class Codes(NamedTuple):
    """A rounded weight: its values are `codes * scales`."""

    codes: Tensor  # int8 `(out, in)`, also for 4 bits
    scales: Tensor  # `(out, groups)`


@dataclass(frozen=True)
class Grid:
    """Whole numbers of `bits` bits, with a scale for each `group_size` inputs of an output; `None`: for each output.

    `scale_dtype`: as the runtime stores scales, so that eager mode computes with the same; `None`: the weight's.
    """

    bits: int
    group_size: int | None = None
    scale_dtype: torch.dtype | None = None

    @property
    def lowest(self) -> int:
        """The least code, -8 for 4 bits."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The greatest code, 7 for 4 bits."""
        return (1 << (self.bits - 1)) - 1

    def inputs_per_scale(self, width: int) -> int:
        """How many inputs share a scale in a weight with `width` inputs."""
        return width if self.group_size is None else self.group_size

    def split(self, weight: Tensor) -> Tensor:
        """A weight `(out, in)` as `(out, groups, inputs)`."""
        rows, width = weight.shape
        inputs = self.inputs_per_scale(width)
        return weight.reshape(rows, width // inputs, inputs)

    def round(self, values: Tensor) -> Tensor:
        """The nearest codes of values in steps of a scale, in place."""
        return values.round_().clamp_(self.lowest, self.highest)


def absmax_codes(weight: Tensor, grid: Grid) -> Codes:
    """Round to nearest, with the largest value of a group at 7.5 steps (4 bits) or 127.5; torchao's, to the bit."""
    scales = _absmax_scales(weight, grid).to(grid.scale_dtype or weight.dtype)
    return Codes(_round_weight(weight, scales, grid), scales)


def mse_codes(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Codes:
    """Round to nearest, with the scales of `mse_scales`."""
    scales = mse_scales(weight, grid, importance)
    return Codes(_round_weight(weight.float(), scales, grid), scales.to(grid.scale_dtype or weight.dtype))


def mse_scales(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Tensor:
    """For each group the scale of 36 with the least squared error, `(out, groups)` in fp32, each a `scale_dtype`.

    `importance`: of the error at each input, `(in,)`, such as the mean square of the input.
    """
    groups, dtype = grid.split(weight.float()), grid.scale_dtype or weight.dtype
    absmax = _absmax_scales(weight.float(), grid)
    weights = None if importance is None else grid.split(importance.float().unsqueeze(0))
    best, least = absmax, torch.full_like(absmax, torch.inf)
    for factor in _FACTORS:
        scales = (absmax * factor).clamp_(min=torch.finfo(dtype).smallest_normal).to(dtype).float()
        steps = scales.unsqueeze(-1)
        squares = grid.round(groups / steps).mul_(steps).sub_(groups).square_()
        error = (squares if weights is None else squares.mul_(weights)).sum(-1)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best


def _absmax_scales(weight: Tensor, grid: Grid) -> Tensor:
    """In the type of the weight; of a group of zeros the smallest normal number, since kernels refuse smaller ones."""
    largest = grid.split(weight).abs().amax(-1)
    return (largest / ((grid.highest - grid.lowest) / 2)).clamp_(min=torch.finfo(weight.dtype).smallest_normal)


def _round_weight(weight: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    # by a reciprocal in the type of the scales, as torchao does
    return grid.round(grid.split(weight) * (1.0 / scales).unsqueeze(-1)).to(torch.int8).flatten(1)
