"""A layer that carries something extra, and the plain weight that it is equivalent to.

`Wrapped` keeps the plain layer as `base`. The base's tensors keep their state-dict keys: `q.weight` stays
`q.weight`, not `q.base.weight`, so a wrapped model loads the plain model's checkpoint and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from edgetune.core.carriers import Carrier, carrier_of, plain_tensors
from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import replace


class Wrapped(nn.Module):
    """Base class: a plain layer plus extra tensors.

    Subclasses define `forward` and, if the weight or the bias changes, `plain_tensors`. Extra tensors must not have
    names of the base's (`weight`, `bias`): their keys would collide.
    """

    repeats: ClassVar[tuple[str, ...]] = ()  # names of parameters whose values are also in the base's weight

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        keep_base_keys(self)

    def plain_tensors(self) -> dict[str, Tensor]:
        """Weight and, if there is one, bias of the plain layer that computes the same, in the layout of the base."""
        return plain_tensors(self.base)


@contextmanager
def without_parameterless(model: nn.Module) -> Iterator[None]:
    """Inside, layers that wrap without parameters of their own are not there, and the names of the rest are plain."""
    wrapped = [(n, m) for n, m in model.named_modules() if isinstance(m, Wrapped) and not [*m.parameters(False)]]
    for name, layer in wrapped:
        replace(model, name, layer.base)
    try:
        yield
    finally:
        for name, layer in wrapped:
            replace(model, name, layer)


OWN = Carrier(
    owns=lambda layer: isinstance(layer, Wrapped),
    tensors=lambda layer: layer.plain_tensors(),
    base=lambda layer: layer.base,
    base_path=lambda layer: "base",
    counts=lambda layer: {getattr(layer, name): 0 for name in layer.repeats},
)


def keep_base_keys(layer: nn.Module) -> None:
    """Make a wrapping layer read and write its base's tensors under the base's own keys."""
    layer.register_state_dict_post_hook(_shorten_keys)  # type: ignore[no-untyped-call]
    layer.register_load_state_dict_pre_hook(_lengthen_keys)  # type: ignore[no-untyped-call]


def _base_path(layer: nn.Module) -> str:
    return (carrier_of(layer) or OWN).base_path(layer)


def _own_names(layer: nn.Module) -> set[str]:
    tensors = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
    return {name for name, _ in (*tensors, *layer.named_children())}


def _shorten_keys(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    inner = f"{prefix}{_base_path(module)}."
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
            state[f"{prefix}{_base_path(module)}.{rest}"] = state.pop(key)
