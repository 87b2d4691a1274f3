"""Round a weight to integers: grids of codes, symmetric around zero, and their scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

LEAST_GROUP = 32  # XNNPACK takes its multiples, also as the width of a channel
GroupSize = Annotated[int, Field(ge=LEAST_GROUP, multiple_of=LEAST_GROUP)] | Literal["channel"]
_FACTORS = tuple(n / 64 for n in range(38, 74))  # of the absmax scale: 0.59 to 1.14
_PROBED_VALUES = 32  # of the first group, which tell an ordinary weight from one on a grid


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


Rule = Callable[[Tensor, Grid], Codes]  # how a weight `(out, in)` is rounded


def round_to_grid(weight: Tensor, grid: Grid, rule: Rule) -> Codes:
    """Round a weight by `rule`; one that lies on the grid keeps its values, whatever the rule.

    So a weight that was trained to be rounded, or was rounded before, is stored as it computed.
    """
    return codes_on_grid(weight, grid) or rule(weight, grid)


def dequantize(rounded: Codes, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The values of a rounded weight in this type, as torchao computes them, to the bit."""
    return (grid.split(rounded.codes).to(dtype) * rounded.scales.unsqueeze(-1)).to(dtype).flatten(1)


def codes_on_grid(weight: Tensor, grid: Grid) -> Codes | None:
    """Codes and scales that give exactly this weight; `None` if there are none, as for an ordinary weight.

    The largest value of a group is a whole number of steps, so its scale is one of few, and each is tried.
    """
    groups, dtype = grid.split(weight).flatten(0, 1), grid.scale_dtype or weight.dtype
    if weight.is_meta or not weight.numel():
        return None
    largest = groups.abs().amax(-1)
    if not bool(torch.isfinite(largest).all()):
        return None
    scales = torch.full_like(largest, torch.finfo(dtype).smallest_normal, dtype=dtype)  # of a group of zeros
    left = largest.nonzero().flatten()
    steps = range(-grid.lowest, 0, -1)
    if len(left):
        tried = torch.cat([scale for n in steps for scale in _scales_of(largest[left[:1]], n, dtype)])
        if not bool(_is_exact(groups[left[0], :_PROBED_VALUES], tried, grid).any()):
            return None
    for n in steps:
        for index in range(len(_scales_of(largest[:0], n, dtype))):
            scale = _scales_of(largest[left], n, dtype)[index]
            exact = _is_exact(groups[left], scale, grid)
            scales[left[exact]] = scale[exact]
            left = left[~exact]
            if not len(left):
                codes = grid.round(groups.float() / scales.float().unsqueeze(-1)).to(torch.int8)
                return Codes(codes.view(weight.shape), scales.view(len(weight), -1))
    return None


def _scales_of(largest: Tensor, steps: int, dtype: torch.dtype) -> list[Tensor]:
    """The scales by which the largest values of groups may be that many steps: no finer than the weight's own type."""
    coarse = max(dtype, largest.dtype, key=lambda kind: torch.finfo(kind).eps)
    scales = (largest.float() / steps).to(coarse)
    if coarse != largest.dtype:
        return [scales.to(dtype)]
    zero, infinity = torch.zeros_like(scales), torch.full_like(scales, torch.inf)
    near = (scales, torch.nextafter(scales, zero), torch.nextafter(scales, infinity))  # the product was rounded
    return [scale.to(dtype) for scale in near]


def _is_exact(groups: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """For each scale, whether whole numbers of it are exactly the values of its group; one group may have several."""
    steps = scales.unsqueeze(-1)
    codes = grid.round(groups.float() / steps.float())
    same = ((codes.to(groups.dtype) * steps).to(groups.dtype) == groups).all(-1)
    return same & (scales >= torch.finfo(scales.dtype).smallest_normal)


def absmax_codes(weight: Tensor, grid: Grid) -> Codes:
    """Round to nearest, with the largest value of a group at 7.5 steps (4 bits) or 127.5; torchao's, to the bit."""
    scales = _absmax_scales(weight, grid).to(grid.scale_dtype or weight.dtype)
    return Codes(_round_weight(weight, scales, grid), scales)


def scaled_codes(weight: Tensor, grid: Grid, scales: Tensor) -> Codes:
    """Round to nearest with given scales `(out, groups)`."""
    codes = grid.round(grid.split(weight.float()) / scales.float().unsqueeze(-1))
    return Codes(codes.to(torch.int8).flatten(1), scales)


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
