"""Linears whose inputs of the largest range go through a small linear of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OutlierLinear(nn.Linear):
    """The part of a split linear for some of its inputs. It is never rounded to 4 bits."""


class SplitLinear(nn.Linear):
    """A linear that sees zeros in place of some inputs, which its child `outlier` multiplies.

    So that it computes what the plain linear does, and the inputs that are quantized have a smaller range. The weight
    keeps the columns of these inputs until it is quantized.
    """

    columns: Tensor  # which inputs go through `outlier`
    kept: Tensor  # `(in,)`: 0 for these, else 1
    outlier: OutlierLinear

    def forward(self, input: Tensor) -> Tensor:
        """As of the plain linear."""
        main = F.linear(input * self.kept, self.weight, self.bias)
        outlying: Tensor = self.outlier(input.index_select(-1, self.columns))
        return main + outlying

    @property
    def source_parameters(self) -> int:
        """How many weights the plain linear has."""
        return self.in_features * self.out_features + (0 if self.bias is None else self.bias.numel())


def split_linear(layer: nn.Linear, columns: Tensor) -> None:
    """Make the layer a `SplitLinear`, in place: other modules may hold it too. `columns`: indices of inputs."""
    weight = layer.weight.detach()
    outlier = _make_split(layer, columns)
    outlier.weight = nn.Parameter(weight[:, columns].clone(), requires_grad=layer.weight.requires_grad)


def join_linear(layer: nn.Linear) -> None:
    """The reverse, for a layer whose weight is still that of the plain linear."""
    if isinstance(layer, SplitLinear):
        del layer.columns, layer.kept, layer.outlier
        layer.__class__ = nn.Linear  # type: ignore[assignment]


def drop_outlier_columns(layer: nn.Linear) -> None:
    """Write zeros for the inputs that the weight does not see, before it is rounded."""
    if isinstance(layer, SplitLinear):
        layer.weight = nn.Parameter(layer.weight.detach() * layer.kept, requires_grad=False)


def seen_by_weight(layer: nn.Linear, hessian: Tensor) -> Tensor:
    """The sum of x x' of what the weight of a layer multiplies, from that of its inputs."""
    if isinstance(layer, SplitLinear):
        hessian = hessian * layer.kept * layer.kept.unsqueeze(1)
    padding = layer.weight.shape[1] - len(hessian)
    return F.pad(hessian, (0, padding, 0, padding))


def rebuild_split(model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    """Split the linears whose parts are in a state dict."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and f"{name}.columns" in state:
            _make_split(layer, state[f"{name}.columns"])
    return model


def _make_split(layer: nn.Linear, columns: Tensor) -> OutlierLinear:
    kept = torch.ones(layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    kept[columns] = 0.0
    layer.__class__ = SplitLinear
    layer.register_buffer("columns", columns)
    layer.register_buffer("kept", kept)
    outlier = OutlierLinear(len(columns), layer.out_features, bias=False, device=kept.device, dtype=kept.dtype)
    layer.outlier = outlier
    return outlier
