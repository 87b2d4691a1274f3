"""Layers that carry something extra, and the equivalent plain layer: one line in one table for each kind.

Ours (`Wrapped`), peft's tuner layers of any family, and the 4-bit linears of bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.registry import load

CARRIERS = (  # the outer ones of a nest first
    "edgetune.core.wrapped:OWN",
    "edgetune.core.peft_layers:PEFT",
    "edgetune.core.packed_layers:PACKED",
)


@dataclass(frozen=True)
class Carrier:
    """One kind of layer that carries something extra, as functions of a layer.

    `tensors` raises `EdgetuneError` if no plain layer computes the same.
    """

    owns: Callable[[nn.Module], bool]  # whether the layer is of this kind
    tensors: Callable[[Any], dict[str, Tensor]]  # of the plain layer that computes the same, in the layout of the base
    base: Callable[[Any], nn.Module] = lambda layer: layer  # the layer inside; itself if it replaces the plain one
    base_path: Callable[[Any], str] = lambda layer: ""  # the name in the layer of its base, if it has one
    hidden_tensors: Callable[[Any], list[Tensor]] = lambda layer: []  # that it stores beside parameters and buffers
    counts: Callable[[Any], dict[Tensor, int]] = lambda layer: {}  # values in parameters that stand for more or fewer


@cache
def carriers() -> tuple[Carrier, ...]:
    """One object for each line of the table."""
    return tuple(load(line) for line in CARRIERS)


def carrier_of(layer: nn.Module) -> Carrier | None:
    """The carrier of a layer; `None` for a plain one."""
    return next((carrier for carrier in carriers() if carrier.owns(layer)), None)


def is_wrapped(layer: nn.Module) -> bool:
    """Whether the layer carries something extra."""
    return carrier_of(layer) is not None


def plain_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Weight and, if there is one, bias that the layer computes with, whatever it is wrapped in.

    In the layout of its base. Raises `EdgetuneError` for a layer without a weight, and for an adapter that no plain
    layer can represent.
    """
    carrier = carrier_of(layer)
    if carrier is not None:
        return carrier.tensors(layer)
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(weight, Tensor):
        raise EdgetuneError("this layer has no weight", got=type(layer).__name__, action="target linears, convolutions")
    return {"weight": weight, "bias": bias} if isinstance(bias, Tensor) else {"weight": weight}


def plain_layer(layer: nn.Module) -> nn.Module:
    """The innermost layer, without everything that wraps it."""
    carrier = carrier_of(layer)
    inner = layer if carrier is None else carrier.base(layer)
    return layer if inner is layer else plain_layer(inner)


def float_type_of(module: nn.Module) -> torch.dtype:
    """The type of the values that the module computes with."""
    layers = [plain_layer(inner) for inner in module.modules()]
    stated = next((layer.plain_dtype for layer in layers if hasattr(layer, "plain_dtype")), None)
    types = [parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()]
    return stated or next(iter(types), torch.float32)  # type: ignore[return-value]
