"""Activations whose output is computed again in backward, so that what comes after them saves nothing of its own.

GELU and SiLU save their input. The product after them (`silu(gate) * up`) would save the activation's output, and a
trained linear after that the product: both follow from the inputs, which are saved anyway. So a `Producer` notes how
the last activation came about, and a product or a trained linear that is given that very tensor saves the inputs.
In 8 bits a trained linear after an activation, a product or a norm saves its input as int8 with a scale per row (off
by at most the row's peak / 254; after a norm, of the normalized rows, which the norm saves anyway).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from edgetune.lean import onednn
from edgetune.lean.activations import (
    ACTIVATIONS,
    activate_saving_derivative,
    activate_saving_input,
    apply_dropout,
    times_derivative,
)
from edgetune.lean.attention import attention_gradients
from edgetune.lean.frozen_ops import linear as frozen_linear
from edgetune.lean.packing import autocast_dtype, from_rows, new_seed, no_autocast, to_rows
from edgetune.lean.producers import (
    ATTENTION,
    NORM,
    OUTPUT,
    PRODUCT,
    LastActivation,
    Producer,
    Rebuilder,
    Saved,
    tensors_to_save,
)


class _Gated(torch.autograd.Function):
    """act(gate) * up; saves gate and up, or what they follow from. `y` is act(gate)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, gate: Tensor, up: Tensor, y: Tensor, kind: str, saved: Sequence[Saved]
    ) -> Tensor:
        ctx.kind, ctx.rebuild = kind, Rebuilder(saved)
        ctx.save_for_backward(*tensors_to_save(saved))
        return y * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gate, up), activation = ctx.rebuild(ctx.saved_tensors), ACTIVATIONS[ctx.kind]
        for_gate = activation.backward(gradient * up, gate) if ctx.needs_input_grad[0] else None
        for_up = (activation.value(gate) * gradient).sum_to_size(up.shape) if ctx.needs_input_grad[1] else None
        return for_gate, for_up, None, None, None


class _ByteGated(torch.autograd.Function):
    """The same in three bytes per element: the derivative, act(gate) and up, the last two with a scale per row.

    `y` is act(gate), `steps` its derivative as `ByteDerivative` saves it, in this order of the dimensions.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, gate: Tensor, up: Tensor, y: Tensor, kind: str, steps: Tensor, order: list[int]
    ) -> Tensor:
        ctx.kind, ctx.order = kind, order
        ctx.save_for_backward(steps, *to_rows(up), *to_rows(y))
        return y * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        steps, up, up_scale, y, y_scale = ctx.saved_tensors
        for_gate = from_rows(up, up_scale, gradient.dtype).mul_(gradient)
        for_gate = times_derivative(for_gate, steps, ACTIVATIONS[ctx.kind], ctx.order)
        return for_gate, from_rows(y, y_scale, gradient.dtype).mul_(gradient), None, None, None, None


class _LinearOf(torch.autograd.Function):
    """A linear, with a low-rank path or without, that saves its input, or what its producer saves.

    `x` is that input, without a graph where there is a producer: the gradient goes to the `inputs` of the producer.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, path: _Path | None, down: Tensor | None,
        up: Tensor | None, producer: Producer | None, *inputs: Tensor,
    ) -> Tensor:  # fmt: skip
        saved = [Saved((x,))] if producer is None else producer.saved
        ctx.path, ctx.rebuild = path, Rebuilder(saved)
        ctx.origin = ("", ()) if producer is None else (producer.kind, producer.settings)
        y, low = onednn.linear(x, weight, bias), None
        if path is not None and down is not None and up is not None:
            low = path.narrow(x, down)
            y = path.add(y, low, up)
        ctx.save_for_backward(weight, down, up, low, *tensors_to_save(saved))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, down, up, low, *saved = ctx.saved_tensors
        path, rows, needs = ctx.path, gradient.reshape(-1, gradient.shape[-1]), ctx.needs_input_grad
        for_x = for_down = for_up = None
        for_inputs: tuple[Tensor | None, ...] = (None,) * len(needs[7:])
        with no_autocast(gradient.device):  # a backward inside autocast stays in the forward's dtype
            if needs[0] or any(needs[7:]):
                for_x = onednn.input_gradient(rows, weight)
            if path is not None:
                for_up = (rows.t() @ low).mul_(path.scale)
                through = (rows @ up).mul_(path.scale)
                if for_x is not None:
                    for_x = path.widen(for_x, through, down)
            (x, *others), (kind, settings) = ctx.rebuild(saved), ctx.origin
            if for_x is not None and kind == ATTENTION:
                x, for_inputs = attention_gradients([x, *others], settings, for_x)
            elif for_x is not None and kind:
                x, for_inputs = _activation_gradients(kind, [x, *others], for_x, needs[7:])
            if path is not None:
                for_down = through.t() @ path.drop_out(x.reshape(-1, x.shape[-1]))
            for_weight = onednn.weight_gradient(rows, x) if needs[1] else None
            for_bias = rows.sum(0) if needs[2] else None
            if for_x is not None:
                for_x = for_x.view(*gradient.shape[:-1], -1) if needs[0] else None
        return for_x, for_weight, for_bias, None, for_down, for_up, None, *for_inputs


def _activation_gradients(
    kind: str, inputs: list[Tensor], gradient: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The output of an activation or a gated product, and the gradients of its inputs from that of its output."""
    activation, back = ACTIVATIONS[kind], gradient.view_as(inputs[0])
    y = activation.value(inputs[0])
    if len(inputs) == 1:
        return y, (activation.backward(back, inputs[0]),)
    gate, up = inputs
    x = y * up
    for_gate = activation.backward(back * up, gate) if needs[0] else None
    return x, (for_gate, y.mul_(back) if needs[1] else None)


class _Path:
    """A low-rank path beside a linear: `scale * up @ down @ dropout(x)`."""

    def __init__(self, scale: float, p: float) -> None:
        self.scale, self.p, self.seed = scale, p, new_seed() if p else 0

    def drop_out(self, x: Tensor) -> Tensor:
        """`x` or a gradient of it, `(rows, in)`, by the mask of this path."""
        return apply_dropout(x, self.p, self.seed, [0, 1]) if self.p else x

    def narrow(self, x: Tensor, down: Tensor) -> Tensor:
        """`(rows, rank)`, the middle of the path."""
        return self.drop_out(x.reshape(-1, x.shape[-1])) @ down.t()

    def add(self, y: Tensor, low: Tensor, up: Tensor) -> Tensor:
        """Add the path to the output of the linear, in place."""
        rows = y.view(-1, y.shape[-1]) if y.is_contiguous() else y.reshape(-1, y.shape[-1])
        return rows.addmm_(low, up.t(), alpha=self.scale).view(y.shape)

    def widen(self, gradient: Tensor, through: Tensor, down: Tensor) -> Tensor:
        """Add the path's share to the gradient of the linear's input."""
        return gradient.add_(self.drop_out(through @ down)) if self.p else gradient.addmm_(through, down)

    def recompute(self, tensors: Sequence[Any]) -> Tensor:
        """The output, from the input and the weights."""
        x, weight, bias, down, up = tensors
        return self.add(onednn.linear(x, weight, bias), self.narrow(x, down), up)


class _LinearOfRows(torch.autograd.Function):
    """A linear that saves its input as int8 rows, or as the normalized rows and the parameters of a norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rows: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight, *rows)
        return onednn.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, steps, scale, *norm = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        with no_autocast(gradient.device):
            x = from_rows(steps, scale, weight.dtype).view(-1, weight.shape[1])
            for_weight = onednn.weight_gradient(rows, _scale_rows(x, *norm))
            for_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
            back = onednn.input_gradient(gradient, weight) if ctx.needs_input_grad[0] else None
        return back, for_weight, for_bias, *[None] * (len(norm) + 2)


def _scale_rows(rows: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    rows = rows if weight is None else rows.mul_(weight)
    return rows if bias is None else rows.add_(bias)


def activation(kind: str, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator `plain(input, inplace)` as one that notes its producer, and in 8 bits saves its derivative."""

    def operator(last: LastActivation, input: Tensor, inplace: bool = False) -> Tensor:
        if not (input.requires_grad and input.is_floating_point()):
            return plain(input, inplace)
        if inplace:
            return activate_saving_derivative(input, kind, inplace) if last.eight_bit else plain(input, inplace)
        saved = last.saved_for(input)
        if last.eight_bit:
            y = activate_saving_derivative(input, kind)
        elif len(saved.tensors) > 1:
            with torch.no_grad():
                value = plain(input, False)
            y = activate_saving_input(input, kind, value, saved)
        else:
            y = plain(input, inplace)
        return last.record(y, kind, input, saved=[saved])

    return operator


def gelu(last: LastActivation, input: Tensor, approximate: str = "none") -> Tensor:
    """`functional.gelu`."""
    kind = "gelu_tanh" if approximate == "tanh" else "gelu"
    return activation(kind, lambda x, _: functional.gelu(x, approximate=approximate))(last, input)


def product(last: LastActivation, input: Any, other: Any) -> Any:
    """`input * other`, with the output of the last activation as one of them."""
    y, up = (input, other) if last.producer_of(input) else (other, input)
    producer = last.producer_of(y)
    if producer is None or len(producer.inputs) != 1 or not isinstance(up, Tensor) or up is y:
        return input * other
    gate = producer.inputs[0]
    fits = up.dtype == y.dtype == gate.dtype and torch.broadcast_shapes(up.shape, y.shape) == y.shape  # type: ignore[no-untyped-call]
    if not fits or not up.requires_grad:
        return input * other
    if hasattr(y.grad_fn, "order") and up.shape == y.shape:
        (steps,), order = y.grad_fn.saved_tensors, y.grad_fn.order
        y_up: Tensor = _ByteGated.apply(gate, up, y.detach(), producer.kind, steps, order)  # type: ignore[no-untyped-call]
        return last.record(y_up, PRODUCT)
    saved_up = last.saved_for(up)
    # one of the two is computed again, which is enough: each costs as much as the layer did
    saved = [Saved((gate,)) if len(saved_up.tensors) > 1 else producer.saved[0], saved_up]
    y_up = _Gated.apply(gate, up, y.detach(), producer.kind, saved)  # type: ignore[no-untyped-call]
    return last.record(y_up, producer.kind, gate, up, saved=saved) if up.shape == y.shape else y_up


def linear(last: LastActivation, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`functional.linear`; after the last activation a trained one saves no input of its own."""
    producer = last.producer_of(input)
    same = producer is not None and all(t.dtype == weight.dtype for t in (input, *producer.inputs))
    if (
        producer is None
        or producer.kind == OUTPUT
        or not same
        or not weight.requires_grad
        or weight.dim() != 2
        or autocast_dtype(input)
    ):
        return frozen_linear(input, weight, bias)
    if last.eight_bit:
        producer.rows = producer.rows or to_rows(input.detach())
        return _LinearOfRows.apply(input, weight, bias, *producer.rows)  # type: ignore[no-any-return,no-untyped-call]
    return _LinearOf.apply(input.detach(), weight, bias, None, None, None, producer, *producer.inputs)  # type: ignore[no-any-return,no-untyped-call]


def low_rank_linear(
    last: LastActivation, input: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float,
    p: float,
) -> Tensor:  # fmt: skip
    """`weight @ x + bias + scale * up @ down @ dropout(x)`, with `weight` and `bias` frozen."""
    producer, path = last.producer_of_view(input), _Path(scale, p)
    if (
        producer is None
        or producer.kind in (OUTPUT, NORM, PRODUCT)
        or any(t.dtype != input.dtype for t in producer.inputs)
    ):
        y: Tensor = _LinearOf.apply(input, weight, bias, path, down, up, None)  # type: ignore[no-untyped-call]
        last.record_linear(y, Saved((input, weight, bias, down, up), path.recompute))
        return y
    return _LinearOf.apply(input.detach(), weight, bias, path, down, up, producer, *producer.inputs)  # type: ignore[no-any-return,no-untyped-call]


def save_columns(last: LastActivation | None, x: Tensor, columns: Tensor) -> tuple[str, tuple[Tensor | None, ...]]:
    """What to save for backward so that `restore_columns` gives `x[..., columns]`: as little as is not saved anyway.

    After an activation or a norm it is what that saves itself; else, or in 8 bits, the columns (in 8 bits as rows).
    `last` is that of the active operators, if any.
    """
    producer = last.producer_of(x) if last is not None else None
    if producer is None or last is None or autocast_dtype(x):
        return "", (x.detach().index_select(-1, columns),)
    if producer.kind == NORM:
        return NORM, producer.rows
    if last.eight_bit:
        return PRODUCT, to_rows(x.detach().index_select(-1, columns))
    return producer.kind, producer.inputs or (x,)


def restore_columns(kind: str, saved: Sequence[Tensor | None], columns: Tensor, dtype: torch.dtype) -> Tensor:
    """The columns of `x`, of what `save_columns` gave."""
    first, *others = saved
    assert first is not None
    if kind == PRODUCT:
        return from_rows(first, others[0], dtype)  # type: ignore[arg-type]
    if kind == NORM:
        rows = from_rows(first.index_select(-1, columns), others[0], dtype)  # type: ignore[arg-type]
        return _scale_rows(rows, *(None if t is None else t.index_select(0, columns) for t in others[1:]))
    if not kind:
        return first
    chosen = [t.index_select(-1, columns) for t in saved if t is not None]
    if kind == OUTPUT:
        return chosen[0]
    y = ACTIVATIONS[kind].value(chosen[0])
    return y if len(chosen) == 1 else y * chosen[1]
