"""peft's LoRA linears in one node, which saves the layer's input once and a few numbers per row.

peft computes such a layer by six operators. In one, the low-rank path is added to the output in place, and the layer's
input is known to whatever comes after it: an activation or a gated product saves that input, which the layer saves
anyway, in the place of its output, and computes the layer again in backward.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.lean.frozen import in_checkpoint
from edgetune.lean.packing import autocast_dtype
from edgetune.lean.producers import LastActivation
from edgetune.lean.products import low_rank_linear

_PLAIN = (Tensor, nn.Parameter)


def find_fitting_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers in the model that compute nothing but `W x + b + scaling * B A dropout(x)`, with A and B trained."""
    peft = sys.modules.get(
        "peft.tuners.lora.layer"
    )  # if not imported, the model has none; importing peft takes seconds
    if peft is not None:
        yield from (module for module in model.modules() if type(module) is peft.Linear and _fits(module))


def _fits(layer: Any) -> bool:
    if "forward" in layer.__dict__ or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (adapter,) = layer.active_adapters
    if adapter not in layer.lora_A or adapter in layer.lora_variant:
        return False
    base, down, up, dropout = (layer.base_layer, *(each[adapter] for each in _parts(layer)))
    if any(type(linear) is not nn.Linear for linear in (base, down, up)):
        return False
    if type(dropout) not in (nn.Identity, nn.Dropout) or down.bias is not None or up.bias is not None:
        return False
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in (base, down, up, dropout)):
        return False
    weights = (base.weight, down.weight, up.weight)
    trains = [p.requires_grad for p in base.parameters()], down.weight.requires_grad and up.weight.requires_grad
    plain = all(type(w) in _PLAIN and w.dtype == base.weight.dtype for w in weights)
    return plain and base.weight.dtype in (torch.float32, torch.float64) and not any(trains[0]) and trains[1]


def _parts(layer: Any) -> tuple[Any, Any, Any]:
    return layer.lora_A, layer.lora_B, layer.lora_dropout


def bind(layer: nn.Module, last: LastActivation) -> Any:
    """A `forward` for the layer while the operators of this `last` are active."""

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        base = self.base_layer
        plain = not args and not kwargs and type(x) in _PLAIN and x.dtype == base.weight.dtype and x.dim() > 1
        if not plain or not _records(x):
            return type(self).forward(self, x, *args, **kwargs)
        (adapter,) = self.active_adapters
        down, up, dropout = (each[adapter] for each in _parts(self))
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return low_rank_linear(last, x, base.weight, base.bias, down.weight, up.weight, float(self.scaling[adapter]), p)

    return types.MethodType(forward, layer)


def _records(x: Tensor) -> bool:
    """Whether the operators are active, and this call is one of theirs."""
    return (
        not torch.compiler.is_compiling() and torch.is_grad_enabled() and not in_checkpoint() and not autocast_dtype(x)
    )
