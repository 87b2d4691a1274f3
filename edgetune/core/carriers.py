"""Layers that carry something extra, and the equivalent plain layer: one line in one table for each kind.

Ours (`Wrapped`), peft's tuner layers of any family, and the 4-bit linears of bitsandbytes.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.registry import load

CARRIERS = (  # the outer ones of a nest first
    "edgetune.core.wrapped:Own",
    "edgetune.core.peft_layers:Peft",
    "edgetune.core.packed_layers:Packed",
)


class Carrier:
    """One kind of layer that carries something extra. `base_name`: the attribute of its base, if it has one."""

    base_name = ""

    def owns(self, layer: nn.Module) -> bool:
        """Whether the layer is of this kind."""
        raise NotImplementedError

    def base(self, layer: nn.Module) -> nn.Module:
        """The layer inside; the layer itself if it replaces the plain one."""
        return layer

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        """Weight and bias of the plain layer that computes the same, in the layout of the base.

        Raises `EdgetuneError` if there is no such plain layer.
        """
        raise NotImplementedError

    def hidden_tensors(self, layer: nn.Module) -> list[Tensor]:
        """Tensors that it stores in addition to parameters and buffers."""
        return []

    def counts(self, layer: nn.Module) -> dict[Tensor, int]:
        """Parameters that represent more or fewer values than they have."""
        return {}


@cache
def carriers() -> tuple[Carrier, ...]:
    """One object for each line of the table."""
    return tuple(load(line)() for line in CARRIERS)


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
