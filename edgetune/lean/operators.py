"""Operators that save less for backward and replace PyTorch's while a model's forward runs.

`LeanOperators` is a pair of hooks on the root of a model. While its forward records a graph, every call of a
function in the tables below goes to the operator of the same meaning that saves less: see activations,
products, norms, attention, loss and frozen_ops; peft's LoRA linears go to low_rank. Values are PyTorch's own;
gradients equal autograd's ("exact"), or are bounded as those files say ("8bit"). Where nothing needs a gradient, under
a compiler, and inside a checkpointed function (which saves nothing, and is computed again outside of these hooks),
PyTorch's own operators run. `LeanModule` does the same for modules written out in several operators.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.core.inputs import tensors_in
from edgetune.lean import activations, head, low_rank, products
from edgetune.lean.activations import ACTIVATIONS, activate_saving_derivative, activate_saving_input
from edgetune.lean.attention import Repeats, scaled_dot_product_attention
from edgetune.lean.frozen import (
    Hook,
    OperatorMode,
    active_mode,
    do_nothing,
    hook_of,
    in_checkpoint,
    never_compile,
    remove_hooks,
)
from edgetune.lean.frozen_ops import REPLACED
from edgetune.lean.loss import cross_entropy
from edgetune.lean.norms import attach_rms_backward, layer_norm, rms_norm, supports_rms_norm
from edgetune.lean.onednn import is_channels_last, view
from edgetune.lean.producers import LastActivation, Saved

Activations = Literal["exact", "8bit"]


def _in_place(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The variant called `name_`, as in `torch.relu_`."""
    return lambda input, *args: operator(input, *args, inplace=True)


_EXACT: dict[Any, Callable[..., Any]] = {
    **REPLACED,
    functional.relu: activations.relu,
    torch.relu: activations.relu,
    Tensor.relu: activations.relu,
    torch.relu_: _in_place(activations.relu),
    Tensor.relu_: _in_place(activations.relu),
    functional.relu6: activations.relu6,
    functional.hardtanh: activations.hardtanh,
    functional.hardtanh_: _in_place(activations.hardtanh),
    functional.dropout: activations.dropout,
    torch.dropout: lambda input, p, train: activations.dropout(input, p, train),
    torch.dropout_: lambda input, p, train: activations.dropout(input, p, train, True),
    functional.cross_entropy: cross_entropy,
    functional.scaled_dot_product_attention: scaled_dot_product_attention,
}
_EIGHT_BIT: dict[Any, Callable[..., Any]] = {
    **_EXACT,
    functional.softmax: activations.softmax_8bit,
    torch.softmax: activations.softmax_method_8bit,
    Tensor.softmax: activations.softmax_method_8bit,
}
_LINKED: dict[Any, Callable[..., Any]] = {  # these look at the last output of one another
    functional.gelu: products.gelu,
    functional.silu: products.activation("silu", functional.silu),
    Tensor.mul: products.product,
    Tensor.__mul__: products.product,
    torch.mul: products.product,
    functional.linear: products.linear,
    functional.layer_norm: layer_norm,
    functional.rms_norm: rms_norm,
}
_LINKED_EIGHT_BIT: dict[Any, Callable[..., Any]] = {
    **_LINKED,
    functional.hardswish: products.activation("hardswish", functional.hardswish),
}
_FAST = {func: REPLACED[func] for func in (functional.linear, functional.conv2d)}
_WRITTEN_OUT = {
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
}


class _Operators(OperatorMode):
    """Sends calls to the operators that save less."""

    def __init__(self, eight_bit: bool) -> None:
        super().__init__()
        self.plain = _EIGHT_BIT if eight_bit else _EXACT
        self.linked = _LINKED_EIGHT_BIT if eight_bit else _LINKED
        self.last, self.repeats = LastActivation(eight_bit), Repeats()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if func is Tensor.view:
            return view(*args, **kwargs)
        if not torch.is_grad_enabled() or "out" in kwargs:  # nothing is saved; only speed counts
            return _FAST.get(func, func)(*args, **kwargs)
        if _writes(getattr(func, "__name__", "."), args, kwargs):
            copy_saved_output_before_write(args or tuple(kwargs.values()))
        if func is functional.multi_head_attention_forward:
            with self:
                return _MULTI_HEAD(*args, **kwargs)
        operator = self.linked.get(func) or self.plain.get(func)
        if operator is not None:
            return func(*args, **kwargs) if in_checkpoint() else self._run(func, operator, args, kwargs)
        if func in _SHAPES and not kwargs:
            return _SHAPES[func](self.repeats, *args)
        return func(*args, **kwargs)

    def _run(self, func: Any, operator: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is functional.scaled_dot_product_attention:
            return operator(self.last, self.repeats, *args, **kwargs)
        if func in self.linked:
            return operator(self.last, *args, **kwargs)
        return operator(*args, **kwargs)


_SHAPES: dict[Any, Callable[..., Tensor]] = {Tensor.expand: Repeats.expand, Tensor.reshape: Repeats.reshape}


def _without_dispatch(function: Any) -> Any:
    """A function of torch that does not hand itself to the mode, so that the calls inside it reach the mode."""
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_MULTI_HEAD = _without_dispatch(functional.multi_head_attention_forward)


_WRITING = frozenset({"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"})
_FLAGGED = frozenset(  # their last argument, by place, is inplace
    {"relu", "relu6", "hardtanh", "silu", "hardswish", "elu", "leaky_relu", "celu", "selu", "mish", "hardsigmoid"}
)


def _writes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call changes its first argument."""
    if (name[-1] == "_" and name[-2:] != "__") or name in _WRITING or kwargs.get("inplace"):
        return True
    return len(args) > 1 and args[-1] is True and (name in _FLAGGED or (name == "dropout" and len(args) > 3))


def copy_saved_output_before_write(args: tuple[Any, ...]) -> None:
    """Before the first argument is changed in place: save a copy if it is a norm's saved output."""
    node = args[0].grad_fn if args and isinstance(args[0], Tensor) else None
    if node is not None and getattr(node, "copied", 0) is None and not node.eight_bit:  # type: ignore[attr-defined]
        *rest, output = node.saved_tensors  # type: ignore[attr-defined]
        node.copied = (*rest, output.clone())  # type: ignore[attr-defined]


def last_activation() -> LastActivation | None:
    """What the active operators recorded last; `None` without any, and in a checkpointed function."""
    mode = active_mode()
    return mode.last if isinstance(mode, _Operators) and torch.is_grad_enabled() and not in_checkpoint() else None


class _EagerHook(Hook):
    """Idle under a compiler, which itself decides what to save and what to recompute."""

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Enter, unless a compiler traces."""
        if not torch.compiler.is_compiling():
            super().before(module, args, kwargs)


class LeanOperators(_EagerHook):
    """Lets a whole model save less for backward. `put_on_operators` and `take_off_operators` handle it."""

    def __init__(self, activations: Activations = "exact") -> None:
        super().__init__()
        self.asked: list[Activations] = [activations]  # by every technique on the model; the last counts
        self.contiguous = False  # whether the caller's images were laid out contiguously

    def put_on(self, module: nn.Module) -> None:
        """Register on the root, and on each module inside that is written out in several operators."""
        super().put_on(module)
        for inner in module.modules():
            if hook_of(inner, LeanModule) is None and LeanModule.fits(inner):
                LeanModule().put_on(inner)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        """Do nothing if no graph is recorded, or if an outer model has its operators in place."""
        if not torch.is_grad_enabled() or isinstance(active_mode(), _Operators):
            return do_nothing
        self.contiguous = not any(is_channels_last(t) for t in tensors_in((args, kwargs)))
        mode = _Operators(self.asked[-1] == "8bit")
        layers = [] if mode.last.eight_bit else list(low_rank.find_fitting_layers(module))
        for layer in layers:  # in the instance, where it hides that of its class for this call
            layer.__dict__["forward"] = low_rank.bind(layer, mode.last)
        mode.__enter__()  # type: ignore[no-untyped-call]

        def leave() -> None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            for layer in layers:
                layer.__dict__.pop("forward", None)

        return leave

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Leave, and return images in the model's own layout, as the caller may take a `view` of them."""
        contiguous, self.contiguous = self.contiguous and len(self.entered) > 0, False
        super().after(module, args, output)
        if contiguous and isinstance(output, Tensor) and output.dim() == 4 and not output.is_contiguous():
            return output.contiguous() if output.is_contiguous(memory_format=torch.channels_last) else None
        return None


never_compile(LeanOperators.after)


def put_on_operators(model: nn.Module, activations: Activations) -> None:
    """Let a model save less for backward; the last requested precision applies."""
    hook = hook_of(model, LeanOperators)
    if hook is None:
        LeanOperators(activations).put_on(model)
        head.put_on(model)
    else:
        hook.asked.append(activations)


def take_off_operators(model: nn.Module) -> None:
    """Undo the last `put_on_operators`; the hooks are removed with the first."""
    hook = hook_of(model, LeanOperators)
    if hook is None:
        return
    hook.asked.pop()
    if not hook.asked:
        remove_hooks(model, (LeanOperators, LeanModule))
        head.take_off(model)


class LeanModule(_EagerHook):
    """One node with our backward for a module that is written out: RMS norms, the GELUs of older models.

    The module runs as it is, without a graph; its output then gets a backward that saves less.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor | None] = []

    @staticmethod
    @torch.no_grad()
    def fits(module: nn.Module) -> bool:
        """Whether the module computes what its name says, by trying it."""
        name, weight = type(module).__name__, module._parameters.get("weight")
        if name in _WRITTEN_OUT:
            x = torch.linspace(-4, 4, 64)
            return torch.allclose(module(x), ACTIVATIONS[_WRITTEN_OUT[name]].value(x), atol=1e-5)
        eps = _eps(module)
        if not name.endswith(("RMSNorm", "T5LayerNorm")) or isinstance(module, nn.RMSNorm) or eps is None:
            return False
        if weight is None or weight.dim() != 1 or not weight.is_floating_point() or len(module._parameters) != 1:
            return False
        x = torch.linspace(-1, 2, len(weight), dtype=weight.dtype, device=weight.device).unsqueeze(0)
        tolerance = 1e-5 if weight.dtype in (torch.float32, torch.float64) else 1e-2
        expected = weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return not weight.is_meta and torch.allclose(module(x), expected, rtol=tolerance, atol=tolerance)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        """Stop recording for this call."""
        x = args[0] if len(args) == 1 and not kwargs else None
        if not torch.is_grad_enabled() or not self._takes(module, x):
            self.inputs.append(None)
            return do_nothing
        self.inputs.append(x)
        torch.set_grad_enabled(False)

        def leave() -> None:
            torch.set_grad_enabled(True)

        return leave

    def _takes(self, module: nn.Module, x: Any) -> bool:
        weight = module._parameters.get("weight")
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return False
        if type(module).__name__ in _WRITTEN_OUT:
            return x.requires_grad
        last = last_activation()
        return (x.requires_grad or (weight is not None and weight.requires_grad)) and supports_rms_norm(
            x, weight, last is not None and last.eight_bit
        )

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Give the output its backward."""
        super().after(module, args, output)
        x = self.inputs.pop() if self.inputs else None
        if x is None or not isinstance(output, Tensor):  # after an error there is no output
            return None
        last = last_activation() or LastActivation(eight_bit=False)  # in a checkpointed function, which saves nothing
        kind = _WRITTEN_OUT.get(type(module).__name__)
        if kind is None:
            return attach_rms_backward(last, x, module._parameters["weight"], _eps(module) or 0.0, output)
        y = (
            activate_saving_derivative(x, kind, value=output)
            if last.eight_bit
            else activate_saving_input(x, kind, output, Saved((x,)))
        )
        return last.record(y, kind, x)


never_compile(LeanModule.after)


def _eps(module: nn.Module) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None
