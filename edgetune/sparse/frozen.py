"""Frozen layers that cost nothing: no graph, no dropout, no kept inputs.

Two kinds of forward hooks, objects that copy and pickle with the model:
`FrozenStage` runs a whole stage (embeddings, a block) in eval mode and without a graph while nothing in it or before
it trains. `FrozenLayer` computes one frozen convolution or normalization inside the graph so that autograd keeps no
input of it. Both look at what trains at every call, so a layer made trainable later is treated as such by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from edgetune.sparse.frozen_ops import REPLACED


class _Hook:
    """A pair of hooks around a module's forward; what was entered is left again, also after an error."""

    def __init__(self) -> None:
        self.entered: list[Callable[[], None]] = []

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.entered.append(self.enter(module, args, kwargs))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if self.entered:  # empty if another hook failed before ours ran
            self.entered.pop()()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        """Change what must be changed for this call; return what undoes it."""
        raise NotImplementedError

    def put_on(self, module: nn.Module) -> None:
        """Register both hooks on `module`."""
        module.register_forward_pre_hook(self.before, with_kwargs=True)
        module.register_forward_hook(self.after, always_call=True)


class FrozenStage(_Hook):
    """Eval mode and no graph, while no parameter of the stage and none of its inputs needs a gradient."""

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        """Do nothing where something trains; else switch dropout and recording off."""
        if any(t.requires_grad for t in (*module.parameters(), *tensors_in((args, kwargs)))):
            return _nothing
        recording, training = torch.is_grad_enabled(), [m for m in module.modules() if m.training]
        for inner in training:
            inner.training = False
        torch.set_grad_enabled(False)

        def leave() -> None:
            torch.set_grad_enabled(recording)
            for inner in training:
                inner.training = True

        return leave


class FrozenLayer(_Hook):
    """No kept input for a layer whose weight is frozen; a batch norm also stays on its running statistics."""

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        """Do nothing where the weight trains; else put our operators in the place of PyTorch's."""
        weight = module._parameters.get("weight")
        if weight is None or weight.requires_grad:
            return _nothing
        training, mode = module.training, _KeepNoInput() if torch.is_grad_enabled() else None
        if isinstance(module, _BatchNorm):
            module.training = False
        if mode is not None:
            mode.__enter__()  # type: ignore[no-untyped-call]

        def leave() -> None:
            if mode is not None:
                mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            module.training = training

        return leave


class _KeepNoInput(TorchFunctionMode):
    """Puts our operators in the place of PyTorch's, for layers of any class: padding of their own goes on working."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return REPLACED.get(func, func)(*args, **(kwargs or {}))


def _nothing() -> None:
    """Undo nothing."""


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KEEPING = (*CONVOLUTIONS, _BatchNorm, nn.LayerNorm, nn.GroupNorm)  # what keeps an input although its weight is frozen


def freeze_batch_norms(model: nn.Module) -> None:
    """Keep every batch norm whose weight is frozen on its running statistics, whatever mode the model is in."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not has_hook(module, FrozenLayer):
            FrozenLayer().put_on(module)


def has_hook(module: nn.Module, kind: type[_Hook]) -> bool:
    """Whether such a hook lies on the module."""
    return any(isinstance(getattr(hook, "__self__", None), kind) for hook in module._forward_pre_hooks.values())


def remove_hooks(model: nn.Module) -> None:
    """Take all hooks of this file off the model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), _Hook)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
