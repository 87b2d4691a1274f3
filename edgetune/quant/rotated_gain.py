"""The weight of a norm on rotated channels: a square linear after the norm, where no layer can take it over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def add_gain(norm: nn.Module, offset: float, rotation: Tensor) -> None:
    """Give a norm of rotated channels the weight that it has for the channels before, in place.

    With the gains g of n channels and their mean m, the norm multiplies by m and then adds what its new child `gain`,
    a linear with the weight Q' diag(g / m - 1) Q, `(n, n)`, computes from that. Apart from the mean, since this is most
    of the matrix: 8 bits would otherwise hardly resolve the rest. Equal gains need no linear. `offset`: what is added
    to the weight of the norm.
    """
    weight: Any = norm.weight
    gains = weight.double() + offset
    weight.fill_((float(gains.mean()) or 1.0) - offset)
    rest = gains / (weight.double() + offset) - 1
    if bool((gains == gains[0]).all()):
        return
    rotation = rotation.to(weight.device)
    linear = _add_linear(norm, weight)
    linear.weight.copy_(rotation.t() @ (rest.unsqueeze(1) * rotation))


def remove_gain(norm: nn.Module) -> None:
    """The reverse, without a change to the weight of the norm."""
    for key in [key for key, hook in norm._forward_hooks.items() if hook is _apply_gain]:
        del norm._forward_hooks[key], norm.gain


def rebuild_gains(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Add the linears that are in a state dict."""
    for name, norm in list(model.named_modules()):
        if f"{name}.gain.weight" in state and not hasattr(norm, "gain"):
            _add_linear(norm, norm.weight)
    return model


def _add_linear(norm: nn.Module, weight: Any) -> nn.Linear:
    linear = nn.Linear(len(weight), len(weight), bias=False, device=weight.device, dtype=weight.dtype)
    norm.gain = linear.requires_grad_(weight.requires_grad).train(norm.training)
    norm.register_forward_hook(_apply_gain)  # a hook: the classes of norms differ, and stay known to others
    return linear


def _apply_gain(norm: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + norm.gain(output)  # type: ignore[no-any-return]
