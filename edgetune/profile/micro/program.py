"""A program to time, and the modules that such programs consist of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

INT4, INT8 = "int4", "int8"

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Micro:
    """A program to time.

    `quantize`: recipe name of the technique applied before lowering, or nothing. `network`: blocks of a model, not a
    chain of one operator.
    """

    name: str
    module: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    quantize: str = ""
    target: str = "xnnpack"
    network: bool = False


class Calls(nn.Module):
    """A function as a module, called repeatedly on its own result."""

    def __init__(self, function: Function, times: int = 1) -> None:
        super().__init__()
        self.function, self.times = function, times

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """Call it `times` times."""
        for _ in range(self.times):
            x = self.function(x, *others)
        return x


class LayerChain(nn.Module):
    """Layers in sequence, as a child with a name: parameter names that begin with a digit break the lowering."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Call them."""
        result: Tensor = self.layers(x)
        return result


def floats(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """Positive inputs of these shapes, the same at each call."""
    return lambda: tuple(torch.randn(shape, generator=torch.Generator().manual_seed(0)).abs() + 0.1 for shape in shapes)


def _format_shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def quantized_name(name: str, quantize: str) -> str:
    """The name with how it is quantized."""
    return f"{name}-{quantize}" if quantize else name


def chain_of(
    name: str, function: Function, *shapes: tuple[int, ...], times: int = 1, quantize: str = "", target: str = "xnnpack"
) -> Micro:
    """A function of inputs of these shapes, applied so many times to the first."""
    ending = "-portable" if target == "portable" else ""
    full = quantized_name(f"{name}-{_format_shape(shapes[0])}{ending}", quantize)
    return Micro(full, partial(Calls, function, times), floats(*shapes), quantize, target)
