"""A function under the operators that keep less, beside the same function under PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.lean.operators import LeanOperators
from edgetune.lean.saved import saved_bytes


class Call(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Any], *weights: Tensor) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(weights)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, *self.weights)


def make_lean(function: Callable[..., Any], activations: Any = "exact") -> Call:
    model = Call(function)
    LeanOperators(activations).put_on(model)
    return model


def gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], seed: int = 3
) -> tuple[Tensor, list[Tensor]]:
    """The value, and gradients of what needs one, for a random gradient of the output."""
    copies = [x.detach().requires_grad_(x.requires_grad) for x in inputs]  # strides stay
    y = function(*copies)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
    return y.detach(), list(torch.autograd.grad(y, [x for x in copies if x.requires_grad], gradient))


def extra_saved_bytes(model: nn.Module, inputs: Any) -> int:
    """Bytes kept besides the inputs of the test, which its leaves hold anyway."""
    return saved_bytes(model, inputs, lambda y: y.sum())


def agree(function: Callable[..., Tensor], *inputs: Tensor, tolerance: float = 1e-5) -> None:
    """Values are PyTorch's own, gradients equal to `tolerance` of their size."""
    expected, wanted = gradients(function, inputs)
    got, found = gradients(make_lean(function), inputs)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert float((a - b).double().norm()) <= tolerance * float(b.double().norm())


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).mul(3).to(dtype).requires_grad_()
