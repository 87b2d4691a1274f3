"""Activations, dropout and softmax that save bits, bytes or a seed for backward.

Exact: ReLU and ReLU6 save one bit per element (extra where a trained layer after a ReLU saves its output anyway),
dropout saves the seed of its mask. In 8 bits: GELU, SiLU and hard-swish save their derivative on a fixed grid that
holds 0 and 1 (the output is exact, the derivative is off by at most half a step: GELU 1/402, SiLU 1/422, hard-swish
1/254, quick GELU 1/422), and softmax its output with a scale per row (off by at most the row's peak / 510).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from edgetune.lean.packing import (
    dropout_noise,
    flatten,
    from_rows,
    make_generator,
    memory_order,
    new_seed,
    pack_bits,
    pieces,
    row_pieces,
    unflatten,
    unpack_bits,
    wide_enough,
)
from edgetune.lean.producers import Rebuilder, Saved

aten = torch.ops.aten


class Activation(NamedTuple):
    """A smooth activation: its value, its derivative times a gradient, and the grid its derivative is saved on."""

    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  # (gradient, input)
    steps: int  # steps of the grid from 0 to 1
    below: int  # steps under 0: the derivative is at least -below / steps and at most (255 - below) / steps


def _quick_gelu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    return aten.silu_backward(gradient, x * 1.702)  # type: ignore[no-any-return]


ACTIVATIONS = {
    "gelu": Activation(functional.gelu, aten.gelu_backward, 201, 26),
    "gelu_tanh": Activation(
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda gradient, x: aten.gelu_backward(gradient, x, approximate="tanh"),
        201,
        26,
    ),
    "silu": Activation(functional.silu, aten.silu_backward, 211, 22),
    "hardswish": Activation(functional.hardswish, aten.hardswish_backward, 127, 64),
    "quick_gelu": Activation(lambda x: x * torch.sigmoid(1.702 * x), _quick_gelu_backward, 211, 22),
}


def derivative_steps(x: Tensor, activation: Activation, order: list[int]) -> Tensor:
    """The derivative at `x` as uint8 `(elements,)` on its grid."""
    flat = flatten(x, order)
    steps = torch.empty(flat.shape, dtype=torch.uint8, device=x.device)
    for piece in pieces(len(flat)):
        wide = wide_enough(flat[piece])
        derivative = activation.backward(torch.full_like(wide, activation.steps), wide)
        steps[piece] = derivative.add_(activation.below + 0.5)
    return steps


def times_derivative(gradient: Tensor, steps: Tensor, activation: Activation, order: list[int]) -> Tensor:
    """The gradient times what `derivative_steps` packed."""
    flat = flatten(gradient, order)
    product = torch.empty_like(flat)
    for piece in pieces(len(flat)):
        derivative = steps[piece].to(flat.dtype).sub_(activation.below).mul_(1 / activation.steps)
        torch.mul(derivative, flat[piece], out=product[piece])
    return unflatten(product, gradient.shape, order)


class _ByteDerivative(torch.autograd.Function):
    """Saves the derivative in one byte per element; `y` holds the value if it was computed already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, inplace: bool, y: list[Tensor]) -> Tensor:  # type: ignore[override]
        activation = ACTIVATIONS[kind]
        ctx.kind, ctx.order = kind, memory_order(x)
        ctx.save_for_backward(derivative_steps(x, activation, ctx.order))
        if not inplace:
            return y[0] if y else activation.value(x)
        ctx.mark_dirty(x)
        return x.copy_(activation.value(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        for_x = times_derivative(gradient, ctx.saved_tensors[0], ACTIVATIONS[ctx.kind], ctx.order)
        return for_x, None, None, None


class _FromInput(torch.autograd.Function):
    """Saves the input alone, or what that follows from; `y` holds the value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, y: list[Tensor], saved: Saved) -> Tensor:  # type: ignore[override]
        ctx.kind, ctx.rebuild = kind, Rebuilder([saved])
        ctx.save_for_backward(*saved.tensors)
        return y[0]  # in a list, so that it is no input and can become the output itself

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.rebuild(ctx.saved_tensors)
        return ACTIVATIONS[ctx.kind].backward(gradient, x), None, None, None


def activate_saving_derivative(x: Tensor, kind: str, inplace: bool = False, value: Tensor | None = None) -> Tensor:
    """The activation, saving its derivative in one byte per element; `value`: if it was computed already."""
    return _ByteDerivative.apply(x, kind, inplace, [] if value is None else [value])  # type: ignore[no-any-return,no-untyped-call]


def activate_saving_input(x: Tensor, kind: str, value: Tensor, saved: Saved) -> Tensor:
    """The activation with this value, for an `x` that can be computed from what is saved."""
    return _FromInput.apply(x, kind, [value], saved)  # type: ignore[no-any-return,no-untyped-call]


class _Clamped(torch.autograd.Function):
    """max(x, 0), or between 0 and `top`; saves one bit per element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, top: float | None, inplace: bool) -> Tensor:  # type: ignore[override]
        into = x if inplace else None
        y = torch.clamp(x, 0, top, out=into) if top is not None else torch.clamp_min(x, 0, out=into)
        ctx.order = memory_order(y)
        flat = flatten(y, ctx.order)
        bits = torch.empty((len(flat) + 7) // 8, dtype=torch.uint8, device=x.device)
        for piece in pieces(len(flat)):
            part = flat[piece]
            passes = part > 0 if top is None else (top - part).mul_(part) > 0
            bits[piece.start // 8 : (piece.stop + 7) // 8] = pack_bits(passes)
        ctx.save_for_backward(bits)
        if inplace:
            ctx.mark_dirty(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (bits,), flat = ctx.saved_tensors, flatten(gradient, ctx.order)
        for_x = torch.empty_like(flat)
        for piece in pieces(len(flat)):
            packed = bits[piece.start // 8 : (piece.stop + 7) // 8]
            passes = unpack_bits(packed, piece.stop - piece.start).to(flat.dtype)
            aten.threshold_backward.grad_input(flat[piece], passes, 0, grad_input=for_x[piece])
        return unflatten(for_x, gradient.shape, ctx.order), None, None


class _Dropout(torch.autograd.Function):
    """Saves nothing but the seed of the mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, inplace: bool) -> Tensor:  # type: ignore[override]
        ctx.p, ctx.seed, ctx.order = p, new_seed(), memory_order(x)
        y = apply_dropout(x, p, ctx.seed, ctx.order)
        if not inplace:
            return y
        ctx.mark_dirty(x)
        return x.copy_(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return apply_dropout(gradient, ctx.p, ctx.seed, ctx.order), None, None


def apply_dropout(x: Tensor, p: float, seed: int, order: list[int]) -> Tensor:
    """Dropout of `x` by this seed, drawn in this order of the dimensions."""
    flat, generator = flatten(x, order), make_generator(seed, x.device)
    y = torch.empty_like(flat)
    for piece in pieces(len(flat)):
        noise = dropout_noise(piece.stop - piece.start, p, flat.dtype, generator)
        torch.mul(flat[piece], noise, out=y[piece])
    return unflatten(y, x.shape, order)


class _ByteSoftmax(torch.autograd.Function):
    """Saves its output in one byte per element and a scale per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:  # type: ignore[override]
        y = functional.softmax(x, dim, dtype=dtype)  # autocast chooses the dtype
        ctx.dim, ctx.dtype = dim, x.dtype
        moved = y.movedim(dim, -1)
        rows = moved.reshape(-1, moved.shape[-1])
        steps = torch.empty(rows.shape, dtype=torch.uint8, device=x.device)
        scale = torch.empty((len(rows), 1), dtype=torch.float32, device=x.device)
        for piece in row_pieces(rows):
            peak = torch.mul(rows[piece].amax(-1, keepdim=True).float(), 1 / 255, out=scale[piece])
            # a row of NaN (all masked) becomes zeros: it has no gradient to give
            steps[piece] = torch.div(rows[piece], peak).add_(0.5).nan_to_num_(0.0)
        ctx.shape = moved.shape
        ctx.save_for_backward(steps, scale.nan_to_num_(0.0))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        steps, scale = ctx.saved_tensors
        y = from_rows(steps, scale, gradient.dtype).view(ctx.shape).movedim(-1, ctx.dim)
        return aten._softmax_backward_data(gradient, y, ctx.dim, y.dtype).to(ctx.dtype), None, None


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """`functional.relu`."""
    if not (input.requires_grad and input.is_floating_point()):
        return functional.relu(input, inplace)
    return _Clamped.apply(input, None, inplace)  # type: ignore[no-any-return,no-untyped-call]


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """`functional.hardtanh`; with another lower bound than 0, PyTorch's own."""
    if not (input.requires_grad and input.is_floating_point() and min_val == 0 and max_val > 0):
        return functional.hardtanh(input, min_val, max_val, inplace)
    return _Clamped.apply(input, float(max_val), inplace)  # type: ignore[no-any-return,no-untyped-call]


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """`functional.relu6`."""
    return hardtanh(input, 0.0, 6.0, inplace)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`functional.dropout`; it draws one seed from the global generator, so its masks differ from PyTorch's."""
    if not (input.requires_grad and training and 0 < p < 1 and input.is_floating_point() and input.numel()):
        return functional.dropout(input, p, training, inplace)
    return _Dropout.apply(input, p, inplace)  # type: ignore[no-any-return,no-untyped-call]


def softmax_8bit(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
    """`functional.softmax`."""
    if not input.requires_grad or dim is None or not input.numel() or not input.dim():
        return functional.softmax(input, dim, _stacklevel, dtype)
    return _ByteSoftmax.apply(input, dim, dtype)  # type: ignore[no-any-return,no-untyped-call]


def softmax_method_8bit(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """`Tensor.softmax` and `torch.softmax`."""
    return softmax_8bit(input, dim, dtype=dtype)
