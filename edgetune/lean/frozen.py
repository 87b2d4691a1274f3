"""Frozen layers that cost nothing: no graph, no dropout, no saved inputs.

Two kinds of forward hooks, objects that copy and pickle with the model:
`FrozenStage` runs a whole stage (embeddings, a block) in eval mode and without a graph while nothing in it or before
it trains. `FrozenLayer` keeps a frozen batch norm on its running statistics and, where no `LeanOperators` are active,
computes a frozen convolution or normalization without saving its input. Both check what trains at every call, so a
layer that becomes trainable later is handled correctly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch._C._dynamo import eval_frame
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from edgetune.core.inputs import tensors_in
from edgetune.lean.frozen_ops import REPLACED


class Hook:
    """A pair of hooks around a module's forward; `after` also runs after an error."""

    def __init__(self) -> None:
        self.entered: list[Callable[[], None]] = []

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Enter, and store the function that undoes it."""
        self.entered.append(self.enter(module, args, kwargs))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Undo what `before` did; a returned value replaces the output."""
        if self.entered:  # empty if another hook failed before ours ran
            self.entered.pop()()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        """Change the state for this call; return the function that undoes it."""
        raise NotImplementedError

    def put_on(self, module: nn.Module) -> None:
        """Register both hooks on `module`."""
        module.register_forward_pre_hook(self.before, with_kwargs=True)
        module.register_forward_hook(self.after, always_call=True)


def never_compile(function: Any) -> None:
    """Keep torch.compile from compiling a hook after a graph break inside its module, which would warn.

    The same as torch._dynamo's skip_code, which takes a second to import.
    """
    action = eval_frame._FrameAction
    strategy = eval_frame._FrameExecStrategy(action.SKIP, action.DEFAULT)
    eval_frame.set_code_exec_strategy(function.__code__, strategy)


never_compile(Hook.after)
Kind = TypeVar("Kind", bound=Hook)


class FrozenStage(Hook):
    """Eval mode and no graph, while no parameter of the stage and none of its inputs needs a gradient.

    A foreign forward hook inside may need a graph, as that of transformers' `enable_input_require_grads` does for
    reentrant checkpoints: then recording stays on, which records nothing unless that hook makes it.
    """

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        """Switch dropout and recording off, unless something trains."""
        if any(t.requires_grad for t in (*module.parameters(), *tensors_in((args, kwargs), caches=True))):
            return do_nothing
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
    """No saved input for a layer whose weight is frozen; a batch norm also stays on its running statistics."""

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        """Replace PyTorch's operators with ours, unless the weight trains."""
        weight = module._parameters.get("weight")
        if weight is None or weight.requires_grad:
            return do_nothing
        replaces = torch.is_grad_enabled() and not torch.compiler.is_compiling() and active_mode() is None
        training, mode = module.training, _SaveNoInput() if replaces else None
        if isinstance(module, _BatchNorm):
            module.training = False
        if mode is not None:
            mode.__enter__()  # type: ignore[no-untyped-call]

        def leave() -> None:
            if mode is not None:
                mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            module.training = training

        return leave


class OperatorMode(TorchFunctionMode):
    """Replaces PyTorch's operators with ours, for layers of any class: those that pad by themselves still work."""


class _SaveNoInput(OperatorMode):
    """Only those of frozen layers."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        operator = REPLACED.get(func)
        if operator is None or torch.compiler.is_compiling() or in_checkpoint():
            operator = func
        return operator(*args, **(kwargs or {}))


def active_mode() -> OperatorMode | None:
    """The mode that replaces PyTorch's operators where this code runs; `None` if there is none."""
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return next((mode for mode in modes if isinstance(mode, OperatorMode)), None)


def in_checkpoint() -> bool:
    """Whether a checkpointed function is running; PyTorch's own operators must run in it.

    It saves nothing and is recomputed in backward outside of any hook on the model, and PyTorch checks that it then
    saves the same tensors as the first time.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


def do_nothing() -> None:
    """Undo nothing."""


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# layers that save an input although their weight is frozen
SAVING_INPUT = (*CONVOLUTIONS, _BatchNorm, nn.LayerNorm, nn.GroupNorm)


def freeze_batch_norms(model: nn.Module) -> None:
    """Keep every batch norm with a frozen weight on its running statistics in train and eval mode."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and hook_of(module, FrozenLayer) is None:
            FrozenLayer().put_on(module)


def hook_of(module: nn.Module, kind: type[Kind]) -> Kind | None:
    """The module's hook of this kind, if it has one."""
    hooks = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return next((hook for hook in hooks if isinstance(hook, kind)), None)


def remove_hooks(model: nn.Module, kinds: type[Hook] | tuple[type[Hook], ...] = Hook) -> None:
    """Remove the hooks of these kinds from the model, all by default."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), kinds)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
