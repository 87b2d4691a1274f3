"""Micro-programs for a calibration: chains of one operator each, in the sizes and types of models for small devices.

Chains, because one small operator takes less time than the call around it, and because in a model an operator finds the
caches as the operators before it left them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from edgetune.profile.micro.functions import functions, kernels
from edgetune.profile.micro.layers import layers, linear
from edgetune.profile.micro.program import Calls, Function, Micro, chain_of, floats

CHAIN = 33  # operators in the long tiny programs, to measure the cost of one


def _tiny(name: str, function: Function, times: int) -> Micro:
    return Micro(name, lambda: Calls(function, times), floats((1, 16)))


def tiny() -> tuple[Micro, Micro, Micro, Micro]:
    """One and many tiny operators: delegated to XNNPACK (abs), and portable ones (cumsum)."""

    def portable(x: Tensor) -> Tensor:
        return torch.cumsum(x, -1)

    return (
        _tiny("tiny-delegated-1", torch.abs, 1),
        _tiny(f"tiny-delegated-{CHAIN}", torch.abs, CHAIN),
        _tiny("tiny-portable-1", portable, 1),
        _tiny(f"tiny-portable-{CHAIN}", portable, CHAIN),
    )


def _alternating(x: Tensor) -> Tensor:
    """Alternate between the backend and a portable kernel, so that each is a call."""
    return torch.cumsum(x.abs(), -1)


def _parts() -> Iterator[Micro]:
    """Many calls of the backend in one program."""
    yield chain_of("parts", _alternating, (1, 16), times=8)
    yield chain_of("parts", _alternating, (1, 16, 64), times=8)


def quick() -> tuple[Micro, ...]:
    """A few, enough to test a calibration."""
    return (linear(64, 256, 256, 1), linear(64, 512, 512, 1), chain_of("add", torch.add, (1, 65536), (1, 65536)))


def programs() -> tuple[Micro, ...]:
    """All programs except the tiny ones, in sizes of small language and vision models."""
    return (*layers(), *functions(), *kernels(), *_parts())
