"""Linears and convolutions that oneDNN, a library inside PyTorch, runs faster than PyTorch's own CPU path.

Linears: PyTorch computes fp32 products by MKL, which on processors that are not Intel's runs at less than half the
rate (185 against 420 GFLOP/s on two Zen 5 cores). oneDNN's linear is there as the operator that inductor calls; it
takes weights of any strides, so nothing is packed or copied. Convolutions: with channels last, oneDNN need not reorder
every input and output (the training step of an EfficientNet-Lite0: 406 ms, then 259). `make bench-sparse` times both
by its method `full with lean`. Values differ from PyTorch's own by rounding.

Small products, other dtypes and devices, tensor subclasses and anything that is traced go to PyTorch.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_LEAST_PRODUCTS = 2**20  # multiply-accumulates below which finding oneDNN's kernel takes longer than the product
_PLAIN = (Tensor, nn.Parameter)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: `(..., in)`, `(out, in)`, `(out,)` -> `(..., out)`. Records no graph."""
    return _product(x, weight, bias) if supports(x, weight, bias) else functional.linear(x, weight, bias)


def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """`gradient @ weight`: `(..., out)`, `(out, in)` -> `(..., in)`."""
    return _product(gradient, weight.t()) if supports(gradient, weight.t()) else gradient @ weight


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """`gradient.T @ x`, over all but the last dimension of both: `(..., out)`, `(..., in)` -> `(out, in)`."""
    rows, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
    if not supports(rows.t(), inputs.t()):
        return rows.t() @ inputs
    if rows.shape[1] < inputs.shape[1]:  # oneDNN is faster with few rows in its output
        return _product(rows.t(), inputs.t())
    return _product(inputs.t(), rows.t()).t().contiguous()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def supports(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN can compute `linear(x, weight, bias)`, and is worth calling."""
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or x.numel() * weight.shape[0] < _LEAST_PRODUCTS:
        return False
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != weight.shape[:1]):
        return False
    return _takes(x, weight) and not torch.is_autocast_enabled("cpu")


def channels_last(x: Tensor, weight: Tensor) -> Tensor:
    """The input of a 2-D convolution in oneDNN's layout, which the output then has too."""
    if x.dim() != 4 or weight.dim() != 4 or not _takes(x, weight):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def match_layout(gradient: Tensor, weight: Tensor) -> Tensor:
    """The weight of a convolution in the layout of the gradient of its output, which backward then keeps."""
    return weight.contiguous(memory_format=torch.channels_last) if is_channels_last(gradient) else weight


def select_channels(x: Tensor, indices: Tensor) -> Tensor:
    """`x[:, indices]`, in the layout of `x`."""
    if not is_channels_last(x):
        return x.index_select(1, indices)
    return x.permute(0, 2, 3, 1).index_select(3, indices).permute(0, 3, 1, 2)


def is_channels_last(x: Tensor) -> bool:
    """Whether it is laid out channels last and is not contiguous as well."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def view(x: Tensor, *shape: Any, **named: Any) -> Tensor:
    """`Tensor.view` that also takes channels last, for models written for the contiguous layout."""
    return (x.contiguous() if is_channels_last(x) else x).view(*shape, **named)


def _takes(*tensors: Tensor) -> bool:
    plain = all(type(t) in _PLAIN and t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    return _AVAILABLE and plain and bool(torch.backends.mkldnn.enabled) and not torch.compiler.is_compiling()


_AVAILABLE = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
