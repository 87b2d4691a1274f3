"""A uniform view of the layers that pruning can cut: weights `(out, in, ...)`, units along "out" or "in"."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from edgetune.core.layers import is_transposed

Side = Literal["out", "in", "groups", "raw"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


def is_linear(layer: nn.Module) -> bool:
    """Whether it is `nn.Linear` or the linear of GPT-2."""
    return isinstance(layer, nn.Linear) or is_transposed(layer)


def is_depthwise(layer: nn.Module) -> bool:
    """Whether it is a depthwise convolution."""
    return isinstance(layer, CONVOLUTIONS) and layer.groups == layer.in_channels == layer.out_channels > 1


def is_candidate(layer: nn.Module) -> bool:
    """Whether its outputs could be units: a linear or a convolution."""
    return is_linear(layer) or isinstance(layer, CONVOLUTIONS)


def axis_of(layer: nn.Module, axis: Side) -> int:
    """The dimension of the layer's own weight for "out" or "in"."""
    swapped = is_transposed(layer) or (isinstance(layer, TRANSPOSED) and not is_depthwise(layer))
    return int((axis == "in") != swapped)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a linear or convolution as `(out, in, ...)`, of a batch norm as `(out,)`."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.transpose(0, 1) if axis_of(layer, "out") == 1 else weight


def width_of(layer: nn.Module, axis: Side) -> int:
    """Positions of the layer along an axis."""
    if isinstance(layer, BATCH_NORMS):
        return layer.num_features
    return weight_of(layer).shape[0 if axis == "out" else 1]


def channel_dimension(layer: nn.Module) -> int:
    """The channel dimension of the layer's inputs and outputs, counted from the end."""
    return -1 - len(layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else -1


def cannot_cut(layer: nn.Module) -> str:
    """Why a layer cannot be cut, in words; empty where it can."""
    name = type(layer).__name__
    if is_parametrized(layer) or {n for n, _ in layer.named_parameters()} - {"weight", "bias"}:
        return f"{name} that computes its weight"
    if isinstance(layer, TRANSPOSED) and layer.groups > 1 and not is_depthwise(layer):
        return f"{name} with {layer.groups} groups"  # no dimension of its weight has all its outputs
    return "" if is_candidate(layer) or isinstance(layer, BATCH_NORMS) else name


def follows_weight(layer: nn.Module, parameter: str) -> bool:
    """Whether a parameter or buffer is cut with the layer's weight, or with its statistics where it has no weight."""
    if isinstance(layer, BATCH_NORMS):
        return parameter != ("running_mean" if layer.weight is None else "weight")
    return is_candidate(layer) and parameter == "bias"
