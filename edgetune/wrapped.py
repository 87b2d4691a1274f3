"""A layer that carries something extra, and the plain weight it stands for.

`Wrapped` keeps the plain layer as `base`. The base's tensors keep their state-dict keys: `q.weight` stays
`q.weight`, not `q.base.weight`, so a wrapped model loads the plain model's checkpoint and the other way round.
peft's tuner layers and bitsandbytes' 4-bit linears count as wrapped too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.targets import replace
from edgetune.technique import EdgetuneError


class Wrapped(nn.Module):
    """Base class: a plain layer plus extra tensors. Subclasses give `forward` and, where the weight changes, `dense`.

    The extra tensors must not be called as the base's own (`weight`, `bias`): both would want the same key.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        keep_base_keys(self)

    def dense(self) -> Tensor:
        """The equivalent plain weight, shape `(out, in, ...)` as the base's own."""
        return dense(self.base)


def keep_base_keys(layer: nn.Module) -> None:
    """Make a wrapping layer read and write its base's tensors under the base's own keys."""
    layer.register_state_dict_post_hook(_shorten_keys)  # type: ignore[no-untyped-call]
    layer.register_load_state_dict_pre_hook(_lengthen_keys)  # type: ignore[no-untyped-call]


def _base_name(layer: nn.Module) -> str:
    return "base_layer" if is_peft(layer) else "base"


def _own_names(layer: nn.Module) -> set[str]:
    parameters, buffers, children = (
        layer.named_parameters(recurse=False),
        layer.named_buffers(recurse=False),
        layer.named_children(),
    )
    return {name for names in (parameters, buffers, children) for name, _ in names}


def _shorten_keys(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    inner = f"{prefix}{_base_name(module)}."
    for key in [k for k in state if k.startswith(inner)]:
        short = prefix + key[len(inner) :]
        if short in state:
            raise EdgetuneError(f"{type(module).__name__} names a tensor as its base does", got=short)
        state[short] = state.pop(key)


def _lengthen_keys(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    own = _own_names(module)
    for key in [k for k in state if k.startswith(prefix)]:
        rest = key[len(prefix) :]
        if rest.partition(".")[0] not in own:
            state[f"{prefix}{_base_name(module)}.{rest}"] = state.pop(key)


def is_wrapped(layer: nn.Module) -> bool:
    """Whether the layer carries something extra: ours, peft's tuner layers, or bitsandbytes' 4-bit linears."""
    return isinstance(layer, Wrapped) or is_peft(layer) or is_nf4(layer)


def is_peft(layer: nn.Module) -> bool:
    """Whether it is one of peft's tuner layers."""
    return hasattr(layer, "get_delta_weight") and hasattr(layer, "active_adapters")


def is_nf4(layer: nn.Module) -> bool:
    """Whether it is a 4-bit linear of bitsandbytes (and not peft's layer of the same name)."""
    return any(c.__name__ == "Linear4bit" and c.__module__.startswith("bitsandbytes") for c in type(layer).__mro__)


def dense(layer: nn.Module) -> Tensor:
    """The plain weight `(out, in, ...)` that the layer computes with, whatever it is wrapped in."""
    if isinstance(layer, Wrapped):
        return layer.dense()
    if is_peft(layer):
        return _peft_dense(layer)
    if is_nf4(layer):
        return _nf4_dense(layer)
    if not isinstance(getattr(layer, "weight", None), Tensor):
        raise EdgetuneError("this layer has no weight", got=type(layer).__name__, action="target linears, convolutions")
    return layer.weight  # type: ignore[return-value]


def _peft_dense(layer: Any) -> Tensor:
    weight = dense(layer.get_base_layer())
    if layer.disable_adapters:
        return weight
    variants = getattr(layer, "lora_variant", {})
    for adapter in layer.active_adapters:
        if adapter in layer.merged_adapters or adapter not in layer.scaling:
            continue  # already in the base weight, or an adapter of other layers
        if adapter in variants:  # DoRA and its kin scale the sum: only peft knows how
            weight = variants[adapter].merge_safe(layer, adapter, weight)
            layer._cache_pop(f"{adapter}-weight_norm")  # what merge_safe left behind for an unmerge
        else:
            weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
    return weight


def _nf4_dense(layer: Any) -> Tensor:
    from bitsandbytes import functional

    data, state = layer.weight.data, getattr(layer.weight, "quant_state", None)
    if state is None:
        raise EdgetuneError("an NF4 layer that was never packed has no weight to give", action="apply NF4 first")
    if getattr(state, "packing_format_for_cpu", False):  # another loader's layer, rearranged by a forward in eval mode
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.deepcopy(state))
    unpacked: Tensor = functional.dequantize_4bit(data, state)
    return unpacked.to(torch.float32)


def plain_layer(layer: nn.Module) -> nn.Module:
    """The innermost layer, with everything wrapped around it taken off."""
    while True:
        if isinstance(layer, Wrapped):
            layer = layer.base
        elif is_peft(layer):
            layer = layer.get_base_layer()  # type: ignore[operator]
        else:
            return layer


@torch.no_grad()
def merged(layer: nn.Module) -> nn.Module:
    """The plain layer with the dense weight written into it. Trainability of the base is kept.

    A 4-bit base becomes a new fp32 `nn.Linear`, which trains like any new layer.
    """
    inner, weight = plain_layer(layer), dense(layer).detach()
    if is_nf4(inner):
        plain = nn.Linear(inner.in_features, inner.out_features, False, device="meta")  # type: ignore[arg-type]
        plain.weight, plain.bias = nn.Parameter(weight), inner.bias  # type: ignore[assignment]
        return plain.train(layer.training)
    inner.weight.copy_(weight)  # type: ignore[operator]
    return inner


def merge(model: nn.Module, which: Callable[[nn.Module], bool] = is_wrapped) -> nn.Module:
    """Replace every layer that `which` picks by its plain equivalent, in place, together with what it wraps.

    Raises if the weight of one is tied to another layer, since the other would change with it.
    """
    if which(model):
        return merged(model)
    found = [name for name, module in model.named_modules(remove_duplicate=False) if which(module)]
    outermost = [name for name in found if not any(name.startswith(other + ".") for other in found)]
    done: dict[int, nn.Module] = {}  # a layer may hang in the model under several names
    layers = {name: model.get_submodule(name) for name in outermost}
    _refuse_tied(model, layers)
    for name, layer in layers.items():
        if id(layer) not in done:
            done[id(layer)] = merged(layer)
        replace(model, name, done[id(layer)])
    return model


def _refuse_tied(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    weights = {id(getattr(plain_layer(m), "weight", None)): (n, plain_layer(m)) for n, m in layers.items()}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in weights and weights[id(weight)][1] is not module:
            raise EdgetuneError(
                f"{weights[id(weight)][0]} shares its weight with {name}; merging would change both",
                action="untie the two before wrapping: layer.weight = nn.Parameter(layer.weight.clone())",
            )


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that `Wrapped` layers carry beside their bases, under their state-dict keys."""
    state: dict[str, Tensor] = model.state_dict()
    kept: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Wrapped):
            prefix, own = _key_prefix(model, name), _own_names(layer) - {"base"}
            kept |= {k: v for k, v in state.items() if k.startswith(prefix) and k[len(prefix) :].split(".")[0] in own}
    return kept


def _key_prefix(model: nn.Module, name: str) -> str:
    """What the state-dict keys of the layer called `name` begin with: its name without the words for bases."""
    prefix, module = "", model
    for part in name.split(".") if name else []:
        inner = is_wrapped(module) and part == _base_name(module)
        module = module.get_submodule(part)
        prefix += "" if inner else f"{part}."
    return prefix


def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what `adapter_state` gave. Raises unless the keys are the same."""
    expected = set(adapter_state(model))
    if expected != set(state):
        raise EdgetuneError(
            "the adapter state does not fit this model",
            got=sorted(set(state) - expected) or f"no {sorted(expected - set(state))}",
            allowed=sorted(expected),
        )
    model.load_state_dict(state, strict=False)


def packed_tensors(layer: Any) -> list[Tensor]:
    """What an NF4 layer holds beside its parameters: scales and tables, which are neither parameters nor buffers."""
    tensors: list[Tensor] = []
    state = getattr(layer.weight, "quant_state", None)
    while state is not None:
        tensors += [t for t in (state.absmax, state.code, state.offset) if isinstance(t, Tensor)]
        state = state.state2
    return tensors
