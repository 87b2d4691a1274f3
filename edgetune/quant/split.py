"""Linears that leave a part of their product to small linears, so that few bits fit the rest better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SmallPart(nn.Linear):
    """A small linear of a split one. It is never rounded to 4 bits."""


class SplitLinear(nn.Linear):
    """A linear that computes what the plain one does, with the help of its children.

    `outlier` multiplies some of the inputs; the linear itself sees zeros there, so that the inputs that are quantized
    have a smaller range. The weight keeps the columns of these inputs until it is quantized.
    `offset` multiplies the mean of each group of the inputs that the linear sees; its weight is what the weights of a
    group have in common, times their number, and these weights are without it.
    Either may be missing.
    """

    columns: Tensor | None  # which inputs go through `outlier`
    kept: Tensor | None  # `(in,)`: 0 for these, else 1
    outlier: SmallPart | None
    offset: SmallPart | None

    def forward(self, input: Tensor) -> Tensor:
        """As of the plain linear."""
        seen = input if self.kept is None else input * self.kept
        output = F.linear(seen, self.weight, self.bias)
        if self.outlier is not None and self.columns is not None:
            output = output + self.outlier(input.index_select(-1, self.columns))
        if self.offset is not None:
            output = output + self.offset(group_means(seen, self.offset.in_features))
        return output

    @property
    def source_parameters(self) -> int:
        """How many weights the plain linear has."""
        return self.in_features * self.out_features + (0 if self.bias is None else self.bias.numel())


def group_means(x: Tensor, groups: int) -> Tensor:
    """The means of equal groups of the last dim, `(..., groups)`. XNNPACK averages the last two of four dims alone."""
    size = x.shape[-1] // groups
    return x.reshape(-1, groups, size, 1).mean((2, 3), keepdim=True).reshape(*x.shape[:-1], groups)


def split_outliers_off(layer: nn.Linear, columns: Tensor) -> None:
    """Make the layer a `SplitLinear`, in place: other modules may hold it too. `columns`: indices of inputs."""
    outlier = _make_outlier(layer, columns)
    outlier.weight = nn.Parameter(layer.weight.detach()[:, columns].clone(), requires_grad=layer.weight.requires_grad)


def split_offsets_off(layer: nn.Linear, offsets: Tensor) -> None:
    """Make the layer a `SplitLinear`, in place. `offsets` `(out, groups)`: subtracted from the weights of a group."""
    weight, trains = layer.weight.detach(), layer.weight.requires_grad
    size = layer.in_features // offsets.shape[1]
    layer.weight = nn.Parameter(weight - offsets.repeat_interleave(size, -1), requires_grad=trains)
    part = _make_offset(layer, offsets.shape[1])
    part.weight = nn.Parameter(offsets * size, requires_grad=trains)


def join_linear(layer: nn.Linear) -> None:
    """The reverse of `split_outliers_off`, for a layer whose weight is still that of the plain linear."""
    if isinstance(layer, SplitLinear):
        del layer.columns, layer.kept, layer.outlier, layer.offset
        layer.__class__ = nn.Linear  # type: ignore[assignment]


def drop_outlier_columns(layer: nn.Linear) -> None:
    """Write zeros for the inputs that the weight does not see, before it is rounded."""
    if isinstance(layer, SplitLinear) and layer.kept is not None:
        layer.weight = nn.Parameter(layer.weight.detach() * layer.kept, requires_grad=False)


def seen_by_weight(layer: nn.Linear, hessian: Tensor) -> Tensor:
    """The sum of x x' of what the weight of a layer multiplies, from that of its inputs."""
    if isinstance(layer, SplitLinear) and layer.kept is not None:
        hessian = hessian * layer.kept * layer.kept.unsqueeze(1)
    padding = layer.weight.shape[1] - len(hessian)
    return F.pad(hessian, (0, padding, 0, padding))


def rebuild_split(model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    """Split the linears whose parts are in a state dict."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and f"{name}.columns" in state:
            _make_outlier(layer, state[f"{name}.columns"])
        if isinstance(layer, nn.Linear) and f"{name}.offset.weight" in state:
            _make_offset(layer, state[f"{name}.offset.weight"].shape[1])
    return model


def _make_outlier(layer: nn.Linear, columns: Tensor) -> SmallPart:
    split = _make_split(layer)
    kept = torch.ones(layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    kept[columns] = 0.0
    split.columns, split.kept = columns, kept
    split.outlier = _small_part(layer, len(columns))
    return split.outlier


def _make_offset(layer: nn.Linear, groups: int) -> SmallPart:
    split = _make_split(layer)
    split.offset = _small_part(layer, groups)
    return split.offset


def _make_split(layer: nn.Linear) -> SplitLinear:
    if not isinstance(layer, SplitLinear):
        layer.__class__ = SplitLinear
        for name in ("columns", "kept"):
            layer.register_buffer(name, None)
        for name in ("outlier", "offset"):
            layer.register_module(name, None)
    return layer  # type: ignore[return-value]


def _small_part(layer: nn.Linear, inputs: int) -> SmallPart:
    weight = layer.weight
    return SmallPart(inputs, layer.out_features, bias=False, device=weight.device, dtype=weight.dtype)
