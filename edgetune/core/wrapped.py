"""A layer that carries something extra, and the plain weight it stands for.

`Wrapped` keeps the plain layer as `base`. The base's tensors keep their state-dict keys: `q.weight` stays
`q.weight`, not `q.base.weight`, so a wrapped model loads the plain model's checkpoint and the other way round.
peft's tuner layers and bitsandbytes' 4-bit linears count as wrapped too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from edgetune.core.carriers import base_of, is_nf4, is_peft, nf4_weight, peft_tensors
from edgetune.core.errors import EdgetuneError


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

    def dense_bias(self) -> Tensor | None:
        """The equivalent plain bias `(out,)`; `None`: there is none."""
        return dense_bias(self.base)


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


def dense(layer: nn.Module) -> Tensor:
    """The plain weight that the layer computes with, whatever it is wrapped in, in the layout of its base."""
    if isinstance(layer, Wrapped):
        return layer.dense()
    if is_peft(layer):
        return peft_tensors(layer)["weight"]
    if is_nf4(layer):
        return nf4_weight(layer)
    if not isinstance(getattr(layer, "weight", None), Tensor):
        raise EdgetuneError("this layer has no weight", got=type(layer).__name__, action="target linears, convolutions")
    return layer.weight  # type: ignore[return-value]


def dense_bias(layer: nn.Module) -> Tensor | None:
    """The plain bias that goes with `dense`; `None`: there is none."""
    if isinstance(layer, Wrapped):
        return layer.dense_bias()
    if is_peft(layer):
        return peft_tensors(layer).get("bias")
    bias = getattr(layer, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def plain_layer(layer: nn.Module) -> nn.Module:
    """The innermost layer, with everything wrapped around it taken off."""
    while True:
        if isinstance(layer, Wrapped):
            layer = layer.base
        elif is_peft(layer):
            layer = base_of(layer)
        else:
            return layer
