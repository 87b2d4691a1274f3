"""The kinds of layers that peft adapts, by which its families differ, and the widths of a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from edgetune.core.experts import is_fused
from edgetune.core.layers import is_transposed

Kind = Literal[
    "linear", "Conv1D", "conv1d", "conv2d 1x1", "conv2d", "conv3d", "grouped conv", "embedding", "norm", "experts"
]


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind of a layer; `None` for one that no family of peft adapts. `Conv1D` is GPT-2's linear.

    `experts`: a module that holds the experts of a mixture as fused weights, which are adapted one by one.
    """
    if is_fused(layer):
        return "experts"
    if is_transposed(layer):
        return "Conv1D"
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and layer.groups > 1:
        return "grouped conv"
    if isinstance(layer, nn.Conv2d):
        return "conv2d 1x1" if set(layer.kernel_size) == {1} else "conv2d"
    kinds: dict[Kind, Any] = {"conv1d": nn.Conv1d, "conv3d": nn.Conv3d, "embedding": nn.Embedding}
    kinds["norm"] = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _BatchNorm)
    named = "norm" in type(layer).__name__.lower() and [*layer._parameters] and not [*layer.children()]
    return next((kind for kind, classes in kinds.items() if isinstance(layer, classes)), "norm" if named else None)


def split_fused(chosen: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Module], list[str]]:
    """The modules that an adapter wraps, by name; and of `chosen` the names of fused weights of experts."""
    fused = [name for name, module in chosen.items() if kind_of(module) == "experts"]
    return {name.rpartition(".")[0] if name in fused else name: m for name, m in chosen.items()}, fused


def widths_of(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a layer; of a convolution the inputs of one output value."""
    if isinstance(layer, _ConvNd):
        return layer.in_channels // layer.groups * math.prod(layer.kernel_size), layer.out_channels
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if is_transposed(layer):
        return layer.weight.shape[0], layer.weight.shape[1]
    return (layer.in_features, layer.out_features) if hasattr(layer, "in_features") else (0, 0)
