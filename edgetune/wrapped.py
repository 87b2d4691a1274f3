"""A layer that carries something extra, and the plain weight it stands for.

`Wrapped` keeps the plain layer as `base`. The base's tensors keep their state-dict keys: `q.weight` stays
`q.weight`, not `q.base.weight`, so a wrapped model loads the plain model's checkpoint and the other way round.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgetune.targets import replace
from edgetune.technique import EdgetuneError


class Wrapped(nn.Module):
    """Base class: a plain layer plus extra tensors. Subclasses give `forward` and, where the weight changes, `dense`."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.register_state_dict_post_hook(_shorten_keys)
        self.register_load_state_dict_pre_hook(_lengthen_keys)

    def dense(self) -> Tensor:
        """The equivalent plain weight, shape `(out, in, ...)` as the base's own."""
        return dense(self.base)


def _shorten_keys(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    inner = prefix + "base."
    for key in [k for k in state if k.startswith(inner)]:
        state[prefix + key[len(inner) :]] = state.pop(key)


def _lengthen_keys(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    own = {name for name, _ in module.named_parameters(recurse=False)}
    own |= {name for name, _ in module.named_buffers(recurse=False)}
    own |= {name for name, _ in module.named_children()}
    for key in [k for k in state if k.startswith(prefix)]:
        rest = key[len(prefix) :]
        if rest.partition(".")[0] not in own:
            state[f"{prefix}base.{rest}"] = state.pop(key)


def is_wrapped(layer: nn.Module) -> bool:
    """Whether the layer carries something extra: ours, peft's tuner layers, or bitsandbytes' 4-bit linears."""
    return isinstance(layer, Wrapped) or _is_peft(layer) or _is_nf4(layer)


def _is_peft(layer: nn.Module) -> bool:
    return hasattr(layer, "get_delta_weight") and hasattr(layer, "active_adapters")


def _is_nf4(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Linear4bit" and type(layer).__module__.startswith("bitsandbytes")


def dense(layer: nn.Module) -> Tensor:
    """The plain weight `(out, in, ...)` that the layer computes with, whatever it is wrapped in."""
    if isinstance(layer, Wrapped):
        return layer.dense()
    if _is_peft(layer):
        weight = dense(layer.get_base_layer())  # type: ignore[operator]
        for adapter in layer.active_adapters:  # type: ignore[union-attr]
            weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)  # type: ignore[operator]
        return weight
    if _is_nf4(layer):
        from bitsandbytes.functional import dequantize_4bit

        weight = layer.weight
        if getattr(weight, "quant_state", None) is None:
            raise EdgetuneError("an NF4 layer that was never packed has no weight to give", action="apply NF4 first")
        unpacked: Tensor = dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[arg-type]
        return unpacked.to(torch.float32)
    if not isinstance(getattr(layer, "weight", None), Tensor):
        raise EdgetuneError("this layer has no weight", got=type(layer).__name__, action="target a linear or convolution")
    return layer.weight  # type: ignore[return-value]


def plain_layer(layer: nn.Module) -> nn.Module:
    """The innermost layer, with everything wrapped around it taken off."""
    while True:
        if isinstance(layer, Wrapped):
            layer = layer.base
        elif _is_peft(layer):
            layer = layer.get_base_layer()  # type: ignore[operator]
        else:
            return layer


@torch.no_grad()
def merged(layer: nn.Module) -> nn.Module:
    """The plain layer with the dense weight written into it. Trainability of the base is kept."""
    inner, weight = plain_layer(layer), dense(layer).detach()
    if _is_nf4(inner):
        plain = nn.Linear(inner.in_features, inner.out_features, inner.bias is not None)  # type: ignore[arg-type]
        if inner.bias is not None:
            plain.bias = nn.Parameter(inner.bias.detach().to(torch.float32))  # type: ignore[operator]
        plain.weight = nn.Parameter(weight)
        return plain.to(weight.device).train(layer.training)
    if weight is not inner.weight:
        inner.weight.copy_(weight)  # type: ignore[operator]
    return inner


def merge(model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...] | None = None) -> nn.Module:
    """Replace every wrapped layer (of `kind`, if given) by its plain equivalent, in place."""
    found = [(n, m) for n, m in model.named_modules() if (isinstance(m, kind) if kind else is_wrapped(m))]
    outermost = [(n, m) for n, m in found if not any(n.startswith(o + ".") for o, _ in found if o != n)]
    for name, layer in outermost:
        plain = merged(layer)
        if not name:
            return plain
        replace(model, name, plain)
    return model
