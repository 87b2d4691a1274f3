"""Layer and RMS norms that save one tensor: their output, from which the normalized rows follow; or those in int8.

The output is what a trained linear after the norm saves too, so the norm itself adds one number per row. It is used
where the rows follow from it without loss: fp32 or fp64, and no weight much smaller than its bias. Else the input
is saved, as PyTorch does. In 8 bits the normalized rows are off by at most their peak / 254.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from edgetune.lean.frozen_ops import layer_norm as frozen_layer_norm
from edgetune.lean.packing import autocast_dtype, from_rows, no_autocast, to_rows, wide_enough
from edgetune.lean.producers import OUTPUT, LastActivation

aten = torch.ops.aten
_MOST_SHIFT = 16.0  # |bias / weight|; (y - bias) / weight then loses at most 5 of 24 bits


class _LayerNorm(torch.autograd.Function):
    """Saves its output (or int8 rows) and one number per row."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float, eight_bit: bool
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.eight_bit, ctx.normalized, ctx.copied = eight_bit, shape, None
        ctx.rows = x.shape
        saved = to_rows((x - mean).mul_(rstd).reshape(-1, torch.Size(shape).numel())) if eight_bit else (y,)
        # the weight alone needs no more than the rows
        ctx.save_for_backward(weight, bias, rstd if ctx.needs_input_grad[0] else None, *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, bias, rstd, *saved = _saved_tensors(ctx)
        if ctx.eight_bit:
            normalized = from_rows(saved[0], saved[1], gradient.dtype).view(ctx.rows)
        else:
            normalized = _normalized_from(saved[0], weight, bias)
        needs = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        ones = gradient.new_ones(gradient.shape[: -len(ctx.normalized)] + (1,) * len(ctx.normalized))
        for_x, for_weight, for_bias = aten.native_layer_norm_backward(
            gradient.contiguous(), normalized.contiguous(), ctx.normalized, torch.zeros_like(ones), ones, weight, bias,
            needs,
        )  # fmt: skip
        return for_x.mul_(rstd) if needs[0] else None, None, for_weight, for_bias, None, None


def _saved_tensors(ctx: Any) -> Any:
    """The saved tensors, with a copy of the output if it was changed in place since."""
    return ctx.saved_tensors if ctx.copied is None else ctx.copied


def _normalized_from(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The normalized rows of an output."""
    if weight is None:
        return y if bias is None else y - bias
    inverse = weight.reciprocal()
    return y * inverse if bias is None else torch.addcmul(-bias * inverse, y, inverse)


class _RmsNorm(torch.autograd.Function):
    """weight * x / rms(x); `y` holds that value. Saves it (or int8 rows), and one number per row."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, y: list[Tensor], eight_bit: bool
    ) -> Tensor:
        wide = wide_enough(x)
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.eight_bit, ctx.dtype, ctx.copied = eight_bit, x.dtype, None
        ctx.save_for_backward(weight, rstd, *(to_rows(wide * rstd) if eight_bit else y))
        return y[0]  # in a list, so that it is no input and can become the output itself

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, rstd, *saved = _saved_tensors(ctx)
        with no_autocast(gradient.device):
            gradient = gradient.to(rstd.dtype)
            normalized = (
                from_rows(saved[0], saved[1], rstd.dtype) if ctx.eight_bit else _normalized_from(saved[0], weight, None)
            )
            for_x = for_weight = None
            if ctx.needs_input_grad[1]:
                for_weight = (gradient * normalized).flatten(0, -2).sum(0).to(weight.dtype)
            if ctx.needs_input_grad[0]:
                scaled = gradient if weight is None else gradient * weight
                share = torch.linalg.vecdot(scaled, normalized).unsqueeze(-1).div_(-scaled.shape[-1])
                for_x = torch.addcmul(scaled, normalized, share).mul_(rstd).to(ctx.dtype)
        return for_x, for_weight, None, None, None


def is_invertible(weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the normalized rows follow from the output without noticeable loss."""
    if weight is None:
        return bias is None or bool(bias.abs().max() <= _MOST_SHIFT)
    size = weight.detach().abs()
    least = size.min() > torch.finfo(weight.dtype).tiny * 2**20
    return bool(least if bias is None else least & (bias.detach().abs() <= size * _MOST_SHIFT).all())


def layer_norm(
    last: LastActivation, input: Tensor, normalized_shape: Any, weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """`functional.layer_norm`."""
    rows = input.requires_grad or (weight is not None and weight.requires_grad)
    same = all(t is None or t.dtype == input.dtype for t in (weight, bias))
    plain = input.dtype in (torch.float32, torch.float64) and same and input.numel()
    if not rows or not plain or not (last.eight_bit or is_invertible(weight, bias)):
        return frozen_layer_norm(input, normalized_shape, weight, bias, eps)
    shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
    y: Tensor = _LayerNorm.apply(input, shape, weight, bias, eps, last.eight_bit)  # type: ignore[no-untyped-call]
    if not last.eight_bit:
        return last.record(y, OUTPUT)
    if len(shape) == 1:
        last.record_norm(y, (weight, bias), y.grad_fn.saved_tensors[3:])  # type: ignore[union-attr]
    return y


def rms_norm(
    last: LastActivation, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`functional.rms_norm`."""
    shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
    needed = input.requires_grad or (weight is not None and weight.requires_grad)
    if not needed or len(shape) != 1 or not supports_rms_norm(input, weight, last.eight_bit) or autocast_dtype(input):
        return functional.rms_norm(input, normalized_shape, weight, eps)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    with torch.no_grad():
        y = functional.rms_norm(input, normalized_shape, weight, eps)
    return attach_rms_backward(last, input, weight, eps, y)


def attach_rms_backward(last: LastActivation, x: Tensor, weight: Tensor | None, eps: float, value: Tensor) -> Tensor:
    """`value`, the RMS norm of `x` computed without a graph, with its backward."""
    y: Tensor = _RmsNorm.apply(x, weight, eps, [value], last.eight_bit)  # type: ignore[no-untyped-call]
    if not last.eight_bit:
        return last.record(y, OUTPUT)
    last.record_norm(y, (weight, None), y.grad_fn.saved_tensors[2:])  # type: ignore[union-attr]
    return y


def supports_rms_norm(input: Tensor, weight: Tensor | None, eight_bit: bool) -> bool:
    """Whether `_RmsNorm` may stand for the plain operators here."""
    if weight is not None and weight.dtype != input.dtype:
        return False
    if eight_bit:
        return input.is_floating_point() and input.numel() > 0
    return input.dtype in (torch.float32, torch.float64) and input.numel() > 0 and is_invertible(weight, None)
