"""Frozen layers that cost nothing: no graph, no dropout, no kept inputs.

Two kinds of forward hooks, objects that copy and pickle with the model:
`FrozenStage` runs a whole stage (embeddings, a block) in eval mode and without a graph while nothing in it or before
it trains. `FrozenLayer` keeps a frozen batch norm on its running statistics, and, outside the reach of
`light.operators.LightOperators`, computes one frozen convolution or normalization so that autograd keeps no input of
it. Both look at what trains at every call, so a layer made trainable later is treated as such by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._C._dynamo import eval_frame
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from edgetune.core.inputs import tensors_in
from edgetune.lean.frozen_ops import REPLACED


class Hook:
    """A pair of hooks around a module's forward; what was entered is left again, also after an error."""

    def __init__(self) -> None:
        self.entered: list[Callable[[], None]] = []

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Enter, and remember how to leave."""
        self.entered.append(self.enter(module, args, kwargs))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Undo what `before` did; what is returned, if anything, takes the place of the output."""
        if self.entered:  # empty if another hook failed before ours ran
            self.entered.pop()()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        """Change what must be changed for this call; return what undoes it."""
        raise NotImplementedError

    def put_on(self, module: nn.Module) -> None:
        """Register both hooks on `module`."""
        module.register_forward_pre_hook(self.before, with_kwargs=True)
        module.register_forward_hook(self.after, always_call=True)


def never_compiled_alone(function: Any) -> None:
    """Where a compiler has to break inside a hooked module it would compile the hook by itself, with a warning.

    As torch._dynamo's skip_code does, which takes a second to import.
    """
    action = eval_frame._FrameAction
    strategy = eval_frame._FrameExecStrategy(action.SKIP, action.DEFAULT)
    eval_frame.set_code_exec_strategy(function.__code__, strategy)


never_compiled_alone(Hook.after)


class FrozenStage(Hook):
    """Eval mode and no graph, while no parameter of the stage and none of its inputs needs a gradient.

    A forward hook of another's inside may ask for a graph, as `enable_input_require_grads` of transformers does for
    reentrant checkpoints: then recording is left on, which records nothing unless that hook makes it.
    """

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        """Do nothing where something trains; else switch dropout and recording off."""
        if any(t.requires_grad for t in (*module.parameters(), *tensors_in((args, kwargs)))):
            return nothing
        recording, training = torch.is_grad_enabled(), [m for m in module.modules() if m.training]
        for inner in training:
            inner.training = False
        torch.set_grad_enabled(recording and any(_has_foreign_hook(inner) for inner in module.modules()))

        def leave() -> None:
            torch.set_grad_enabled(recording)
            for inner in training:
                inner.training = True

        return leave


def _has_foreign_hook(module: nn.Module) -> bool:
    return any(not isinstance(getattr(hook, "__self__", None), Hook) for hook in module._forward_hooks.values())


class FrozenLayer(Hook):
    """No kept input for a layer whose weight is frozen; a batch norm also stays on its running statistics."""

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        """Do nothing where the weight trains; else put our operators in the place of PyTorch's."""
        weight = module._parameters.get("weight")
        if weight is None or weight.requires_grad:
            return nothing
        alone = torch.is_grad_enabled() and not torch.compiler.is_compiling() and replacing() is None
        training, mode = module.training, _KeepNoInput() if alone else None
        if isinstance(module, _BatchNorm):
            module.training = False
        if mode is not None:
            mode.__enter__()  # type: ignore[no-untyped-call]

        def leave() -> None:
            if mode is not None:
                mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            module.training = training

        return leave


class Replacing(TorchFunctionMode):
    """Puts our operators in the place of PyTorch's, for layers of any class: padding of their own goes on working."""


class _KeepNoInput(Replacing):
    """Only those of frozen layers."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        operator = REPLACED.get(func)
        if operator is None or torch.compiler.is_compiling() or in_checkpoint():
            operator = func
        return operator(*args, **(kwargs or {}))


def replacing() -> Replacing | None:
    """What puts our operators in the place of PyTorch's where this code runs; None outside."""
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return next((mode for mode in modes if isinstance(mode, Replacing)), None)


def in_checkpoint() -> bool:
    """Whether a checkpointed function runs: PyTorch's operators then, since ours would not be there the second time.

    Such a function keeps nothing, and is computed again in backward, outside of any hook on the model. PyTorch checks
    that it then keeps the same tensors as the first time.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


def nothing() -> None:
    """Undo nothing."""


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KEEPING = (*CONVOLUTIONS, _BatchNorm, nn.LayerNorm, nn.GroupNorm)  # what keeps an input although its weight is frozen


def freeze_batch_norms(model: nn.Module) -> None:
    """Keep every batch norm whose weight is frozen on its running statistics, whatever mode the model is in."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not has_hook(module, FrozenLayer):
            FrozenLayer().put_on(module)


def has_hook(module: nn.Module, kind: type[Hook]) -> bool:
    """Whether such a hook lies on the module."""
    return any(isinstance(getattr(hook, "__self__", None), kind) for hook in module._forward_pre_hooks.values())


def remove_hooks(model: nn.Module, kinds: type[Hook] | tuple[type[Hook], ...] = Hook) -> None:
    """Take the hooks of these kinds off the model; all by default."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), kinds)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
