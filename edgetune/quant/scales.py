"""How much each channel of a group is scaled, and scaling it: SmoothQuant's rule, and AWQ's search."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from edgetune.quant.calibration import InputSizes
from edgetune.quant.channels import ChannelGroup, weight_of
from edgetune.quant.rounding import Grid, absmax_codes, dequantize

_LEAST, _MOST = 1e-4, 1e4  # of a scale
_ALPHAS = tuple(n / 20 for n in range(20))  # that the search tries; 0 leaves the weights as they are
_SEARCHED_ROWS = 512  # of a weight, evenly spaced: the outputs whose error the search sums


def search_scales(
    model: nn.Module, group: ChannelGroup, sizes: Mapping[str, InputSizes], grids: Mapping[str, Grid]
) -> Tensor:
    """rms(x)^alpha with the alpha of 20 that leaves the least squared error of the linears' outputs, when weights are
    rounded to nearest on the linears' `grids` and inputs to 8 bits for each token.

    AWQ (Lin et al., 2023, arXiv:2306.00978, eq. 4 and 5), which keeps inputs in floating point.
    """
    candidates = [_power_scales(group, sizes, alpha) for alpha in _ALPHAS]
    errors = [0.0] * len(candidates)
    for name, channels in group.readers.items():
        weight = weight_of(model, name).detach()
        for n, scales in enumerate(candidates):
            own = scales[channels].to(weight.device)
            errors[n] += output_error(weight.float(), own, grids[name], sizes[name].tokens)
    return candidates[min(range(len(candidates)), key=errors.__getitem__)]


def output_error(weight: Tensor, scales: Tensor, grid: Grid, inputs: Tensor) -> float:
    """The squared error of a linear's outputs when its inputs `(tokens, in)` over the scales `(in,)` and its weight
    `(out, in)` times the scales are rounded."""
    if weight.shape[1] % grid.inputs_per_scale(weight.shape[1]):
        grid = replace(grid, group_size=None)  # as a layer whose width does not fit gets no groups
    weight = weight[:: -(-len(weight) // _SEARCHED_ROWS)]
    rounded = dequantize(absmax_codes(weight * scales, grid), grid, torch.float32)
    return float((_round_tokens(inputs / scales) @ rounded.t() - inputs @ weight.t()).square().sum())


def _round_tokens(inputs: Tensor) -> Tensor:
    """Inputs rounded to 256 steps between the least and the largest of each token, as dynamic quantization does."""
    span = inputs.amax(-1, keepdim=True).clamp(min=0) - inputs.amin(-1, keepdim=True).clamp(max=0)
    steps = (span / 255).clamp_(min=torch.finfo(inputs.dtype).smallest_normal)
    return (inputs / steps).round_().mul_(steps)


def fold_scales(model: nn.Module, group: ChannelGroup, scales: Tensor) -> None:
    """Divide a producer's channels by these scales, and multiply what the readers read."""
    producer, weight = group.producer, weight_of(model, group.producer.layer)
    own = scales.to(weight.device).double()
    with torch.no_grad():
        rows = own.view(-1, *[1] * (weight.dim() - 1))
        weight.copy_((weight.double() + producer.offset) / rows - producer.offset)
        if producer.bias:
            bias = model.get_parameter(f"{producer.layer}.bias")
            bias.copy_(bias.double() / own)
        for name, channels in group.readers.items():
            read = weight_of(model, name)
            read.copy_(read.double() * spread_inputs(scales[channels].to(read.device).double(), read))


def spread_inputs(values: Tensor, weight: Tensor) -> Tensor:
    """Values `(in,)` of the inputs of a linear or a convolution, in a shape that multiplies its weight."""
    groups = len(values) // weight.shape[1]
    spread = values.view(groups, 1, -1).expand(-1, len(weight) // groups, -1)
    return spread.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))


def smooth_scales(model: nn.Module, group: ChannelGroup, sizes: Mapping[str, InputSizes], alpha: float) -> Tensor:
    """max|x|^alpha / max|w|^(1 - alpha); 1 where an input or all its weights are zero.

    SmoothQuant (Xiao et al., 2022, arXiv:2211.10438, eq. 4).
    """
    inputs = _of_channels(group, lambda name: sizes[name].largest)
    weights = _of_channels(group, lambda name: weight_of(model, name).detach().abs().amax(0))
    scales = inputs.pow(alpha) / weights.pow(1 - alpha)
    return torch.where((inputs > 0) & (weights > 0) & group.free, scales.clamp(_LEAST, _MOST), 1.0)


def _power_scales(group: ChannelGroup, sizes: Mapping[str, InputSizes], alpha: float) -> Tensor:
    """AWQ's; over the geometric mean of the least and the largest, so that the weights keep their size."""
    inputs = _of_channels(group, lambda name: sizes[name].mean_square).sqrt()
    chosen = (inputs > 0) & group.free
    if not bool(chosen.any()):
        return torch.ones_like(inputs)
    scales = inputs.pow(alpha)
    scales = scales / (scales[chosen].amin() * scales[chosen].amax()).sqrt()
    return torch.where(chosen, scales.clamp(_LEAST, _MOST), 1.0)


def _of_channels(group: ChannelGroup, size: Callable[[str], Tensor]) -> Tensor:
    """The largest size among the inputs that each channel is, over all linears."""
    largest = torch.zeros(len(group.free))
    for name, channels in group.readers.items():
        largest.scatter_reduce_(0, channels, size(name).cpu().float(), "amax")
    return largest
