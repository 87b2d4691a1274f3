"""Linears whose input is padded with zeros to a width that 4-bit kernels take. The outputs are the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgetune.quant.experts import split_as_stored
from edgetune.quant.size import weight_bits


class PaddedLinear(nn.Linear):
    """A linear with more columns of weights than inputs: zero inputs are added at the end.

    The buffer `inputs` states their number, since a stored weight does not.
    """

    inputs: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """As of a linear with `in_features` inputs."""
        return F.linear(F.pad(input, (0, self.weight.shape[1] - self.in_features)), self.weight, self.bias)

    @property
    def source_parameters(self) -> int:
        """How many weights the layer has without the added ones."""
        return self.in_features * self.out_features + (0 if self.bias is None else self.bias.numel())


def can_pad(layer: nn.Module) -> bool:
    """Whether it computes as `nn.Linear` does."""
    return isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward


def pad_inputs(layer: nn.Linear, multiple: int) -> None:
    """Make the layer a `PaddedLinear` with columns of zeros up to a multiple, in place: other modules may hold it."""
    columns = -layer.in_features % multiple
    layer.weight = nn.Parameter(F.pad(layer.weight.detach(), (0, columns)), requires_grad=False)
    _make_padded(layer)


def _make_padded(layer: nn.Linear) -> None:
    layer.__class__ = PaddedLinear
    layer.register_buffer("inputs", torch.tensor(layer.in_features))


def unpad_inputs(layer: nn.Linear) -> None:
    """The reverse."""
    layer.__class__ = nn.Linear
    del layer.inputs


def rebuild_layers(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Give a plain model the structure of a quantized one.

    That is tables without `padding_idx`, linears that are padded, and experts that are split.
    """
    split_as_stored(model, state)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Embedding) and weight_bits(state[f"{name}.weight"]) is not None:
            layer.padding_idx = None  # type: ignore[assignment]
        elif isinstance(layer, nn.Linear) and f"{name}.inputs" in state:
            layer.in_features = int(state[f"{name}.inputs"])
            layer.weight = nn.Parameter(torch.empty(state[f"{name}.weight"].shape), requires_grad=False)
            _make_padded(layer)
    return model
