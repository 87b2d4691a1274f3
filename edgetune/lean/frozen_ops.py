"""Convolution and normalizations that save no input for backward when their weight is frozen.

PyTorch saves the input of a convolution and of a batch norm whether or not the weight needs a gradient
(`F.linear` does not). Under autocast it saves the cast copy of every frozen weight too; here the weight is cast again.
The gradients here equal autograd's; where a weight does train, PyTorch's own operator runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from edgetune.lean import onednn


class _Convolution(torch.autograd.Function):
    """Saves the weight alone, and only if the input needs a gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
        dilation: list[int], groups: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None)
        ctx.shape, ctx.settings = x.shape, (stride, padding, dilation, False, [0] * len(stride), groups)
        return torch.convolution(x, weight.to(x.dtype), bias, *ctx.settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        for_input = for_bias = None
        if ctx.needs_input_grad[0]:
            (weight,) = ctx.saved_tensors
            for_input = convolution_input_gradient(gradient, weight.to(gradient.dtype), ctx.shape, ctx.settings)
        if ctx.needs_input_grad[2]:
            for_bias = gradient.sum([d for d in range(gradient.dim()) if d != 1])
        return for_input, None, for_bias, None, None, None, None


def convolution_input_gradient(
    gradient: Tensor, weight: Tensor, shape: torch.Size, settings: tuple[Any, ...]
) -> Tensor:
    """The gradient of a convolution's input of this shape, from that of its output.

    As the transposed convolution that it is: aten.convolution_backward asks for the input too, and copies it.
    `settings`: stride, padding, dilation, transposed, output padding, groups, as `torch.convolution` takes them.
    """
    stride, padding, dilation, _, _, groups = settings
    output_padding = [
        size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
        for size, out, s, p, d, k in zip(
            shape[2:], gradient.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    weight = onednn.match_layout(gradient, weight)
    return torch.convolution(gradient, weight, None, stride, padding, dilation, True, output_padding, groups)


class _Linear(torch.autograd.Function):
    """Saves the weight as it is stored, not as autocast casts it, and the input only if the weight trains."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        trains = ctx.needs_input_grad
        ctx.save_for_backward(weight if trains[0] else None, x if trains[1] else None)
        return onednn.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, x = ctx.saved_tensors
        for_input = None if weight is None else onednn.input_gradient(gradient, weight.to(gradient.dtype))
        for_weight = None if x is None else onednn.weight_gradient(gradient, x)
        for_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return for_input, for_weight, for_bias


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`functional.linear` by the faster library; under autocast without saving a cast copy of a frozen weight."""
    records = input.requires_grad or (bias is not None and bias.requires_grad)
    device = input.device.type
    if onednn.supports(input, weight, bias):
        if not torch.is_grad_enabled() or not (records or weight.requires_grad):
            return onednn.linear(input, weight, bias)
        return _Linear.apply(input, weight, bias)  # type: ignore[no-any-return,no-untyped-call]
    if weight.requires_grad or not records or weight.dim() != 2 or not torch.is_autocast_enabled(device):
        return functional.linear(input, weight, bias)
    if torch.float64 in (input.dtype, weight.dtype) or weight.dtype == torch.get_autocast_dtype(device):
        return functional.linear(input, weight, bias)
    dtype = torch.get_autocast_dtype(device)
    return _Linear.apply(input.to(dtype), weight, None if bias is None else bias.to(dtype))  # type: ignore[no-any-return,no-untyped-call]


def pad_input(
    input: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any
) -> tuple[Tensor, list[int], list[int], list[int]]:
    """The arguments of a convolution with each number written out; padding by name is done to the input."""
    count = weight.dim() - 2
    stride, dilation = _each(stride, count), _each(dilation, count)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        input = functional.pad(input, [side for t in reversed(total) for side in (t // 2, t - t // 2)])
    return input, stride, [0] * count if isinstance(padding, str) else _each(padding, count), dilation


def _each(value: Any, count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value) * (count if len(value) == 1 else 1)


def _convolution(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def convolution(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Tensor:  # fmt: skip
        input = onednn.channels_last(input, weight)
        if weight.requires_grad or not (input.requires_grad or (bias is not None and bias.requires_grad)):
            return original(input, weight, bias, stride, padding, dilation, groups)
        input, stride, padding, dilation = pad_input(input, weight, stride, padding, dilation)
        if torch.is_autocast_enabled(input.device.type):  # a Function is not cast by itself
            dtype = torch.get_autocast_dtype(input.device.type)
            input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
        batched = input.dim() == weight.dim()
        x = input if batched else input.unsqueeze(0)
        y: Tensor = _Convolution.apply(x, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-untyped-call]
        return y if batched else y.squeeze(0)

    return convolution


def _batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    records = input.requires_grad or (bias is not None and bias.requires_grad)
    if not records or training or weight is None or weight.requires_grad or running_mean is None or running_var is None:
        return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    shape = [1, -1] + [1] * (input.dim() - 2)
    scale = weight * torch.rsqrt(running_var + eps)
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    return torch.addcmul(shift.view(shape), input, scale.view(shape)).to(input.dtype)


class _BiasOnly(torch.autograd.Function):
    """`y` holds a value to which a trained bias was added; saves nothing. The bias is summed over `dimensions`."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, y: list[Tensor], dimensions: Sequence[int]) -> Tensor:  # type: ignore[override]
        ctx.dimensions = list(dimensions)
        return y[0]  # in a list, so that it is no input and can become the output itself

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return gradient.sum(ctx.dimensions) if ctx.dimensions else gradient, None, None


def layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`functional.layer_norm`, which saves nothing where the bias alone trains."""
    if bias is None or weight is None or weight.requires_grad or input.requires_grad or not bias.requires_grad:
        return functional.layer_norm(input, normalized_shape, weight, bias, eps)
    y = functional.layer_norm(input, normalized_shape, weight, bias.detach(), eps)
    return _BiasOnly.apply(bias, [y], range(input.dim() - bias.dim()))  # type: ignore[no-any-return,no-untyped-call]


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    if bias is None or weight is None or weight.requires_grad or input.requires_grad or not bias.requires_grad:
        return functional.group_norm(input, num_groups, weight, bias, eps)
    y = functional.group_norm(input, num_groups, weight, bias.detach(), eps)
    return _BiasOnly.apply(bias, [y], [d for d in range(input.dim()) if d != 1])  # type: ignore[no-any-return,no-untyped-call]


REPLACED: dict[Any, Callable[..., Tensor]] = {
    functional.linear: linear,
    functional.conv1d: _convolution(functional.conv1d),
    functional.conv2d: _convolution(functional.conv2d),
    functional.conv3d: _convolution(functional.conv3d),
    functional.batch_norm: _batch_norm,
    functional.layer_norm: layer_norm,
    functional.group_norm: _group_norm,
}
