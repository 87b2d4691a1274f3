"""Activations without an XNNPACK operator: ELU and its relatives, softplus, mish and the hard sigmoid.

Each is written as a sum of two parts instead of a selection between two branches, which no float backend takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    """`scale x` above zero, `scale alpha (exp(input_scale x) - 1)` below."""
    below = (torch.exp(x.clamp(max=0.0) * input_scale) - 1.0) * (alpha * scale)
    return torch.relu(x) * scale + below


def selu(x: Tensor) -> Tensor:
    """ELU with the constants of Klambauer et al., 2017."""
    return elu(x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


def celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    """ELU whose slope is 1 on both sides of zero."""
    return elu(x, alpha, 1.0, 1.0 / alpha)


def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """`log(1 + exp(beta x)) / beta`, without overflow for a large x."""
    rest = torch.log(torch.exp(-torch.abs(x * beta)) + 1.0)
    return torch.relu(x) + rest * (1.0 / beta)


def mish(x: Tensor) -> Tensor:
    """`x tanh(softplus(x))` (Misra, 2019)."""
    return x * torch.tanh(softplus(x))


def log_sigmoid(x: Tensor) -> Tensor:
    """`-softplus(-x)`."""
    return -softplus(-x)


def hardsigmoid(x: Tensor) -> Tensor:
    """`clamp(x + 3, 0, 6) / 6`."""
    return (x + 3.0).clamp(0.0, 6.0) / 6.0


def rrelu(x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, generator: Any = None) -> Any:
    """Outside of training the slope below zero is the mean of its bounds."""
    return NotImplemented if training else torch.nn.functional.leaky_relu(x, (lower + upper) / 2)


def prelu(x: Tensor, weight: Tensor) -> Any:
    """As a sum of both sides, but of images: XNNPACK's partitioner takes any dims, and its passes fail at others."""
    if x.dim() == 4:
        return NotImplemented
    slopes = weight.reshape(-1, *[1] * (x.dim() - 2))  # of the channels, the second dim
    return torch.relu(x) - torch.relu(-x) * slopes


_ATEN = torch.ops.aten
WITHOUT_KERNEL: dict[Any, Any] = {_ATEN.rrelu.default: rrelu, _ATEN.prelu.default: prelu}
REPAIRS: dict[Any, Any] = {
    _ATEN.elu.default: elu,
    _ATEN.selu.default: selu,
    _ATEN.celu.default: celu,
    _ATEN.softplus.default: softplus,
    _ATEN.mish.default: mish,
    _ATEN.hardsigmoid.default: hardsigmoid,
    _ATEN.log_sigmoid.default: log_sigmoid,
}
