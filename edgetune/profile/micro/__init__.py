"""Programs for a calibration: single operators in many sizes, and networks of typical blocks.

The runtime records the time of each operator, so that one program shows many. In a network an operator finds the caches
as the operators before it left them; chains of single operators show those kernels that the networks lack.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from edgetune.profile.micro.functions import functions, kernels
from edgetune.profile.micro.layers import layers, linear
from edgetune.profile.micro.networks import networks
from edgetune.profile.micro.program import Micro, chain_of, pack

_PACKED = 30  # chains in one program


def quick() -> tuple[Micro, ...]:
    """A few, enough to test a calibration."""
    chains = (linear(64, 256, 256, 1), linear(64, 512, 512, 1), chain_of("add", torch.add, (1, 65536), (1, 65536)))
    return (*chains, *tuple(networks())[-2:])


def programs() -> tuple[Micro, ...]:
    """All programs: packed chains first."""
    return (*pack((*layers(), *functions(), *kernels()), _PACKED), *_parts(), *_far(), *networks())


def _parts() -> Iterator[Micro]:
    """Many calls of the backend in one program."""
    yield chain_of("parts", _alternating, (1, 16), times=8)
    yield chain_of("parts", _alternating, (1, 16, 64), times=8)


def _far() -> Iterator[Micro]:
    """Weights that no cache holds, for one row and for a few."""
    yield from (linear(rows, 1024, 2048, 4) for rows in (1, 4))


def _alternating(x: Tensor) -> Tensor:
    """Alternate between the backend and a portable kernel, so that each is a call."""
    return torch.cumsum(x.abs(), -1)
