"""A program to time, and the modules that such programs consist of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

INT4, INT8 = "int4", "int8"

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Micro:
    """A program to time, or a chain of one operator that becomes a part of one.

    `quantize`: recipe name of the technique applied before lowering, or nothing. `family`: of a network its kind of
    blocks; empty for chains of one operator each.
    """

    name: str
    module: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    quantize: str = ""
    target: str = "xnnpack"
    family: str = ""


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


class Several(nn.Module):
    """Modules that have nothing to do with each other, each called on its own inputs."""

    def __init__(self, chains: Sequence[Micro]) -> None:
        super().__init__()
        self.parts = nn.ModuleList([chain.module() for chain in chains])
        self.counts = [len(chain.inputs()) for chain in chains]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Call them."""
        outputs, start = [], 0
        for part, count in zip(self.parts, self.counts, strict=True):
            outputs.append(part(*inputs[start : start + count]))
            start += count
        return tuple(outputs)


def pack(chains: Iterable[Micro], most: int) -> Iterator[Micro]:
    """Programs of up to `most` chains each: lowering one of many takes far less time than many of one."""
    alike: dict[tuple[str, str], list[Micro]] = {}
    for chain in chains:
        alike.setdefault((chain.target, chain.quantize), []).append(chain)
    for (target, quantize), own in alike.items():
        for number, start in enumerate(range(0, len(own), most)):
            name = quantized_name(f"{target}-{number}", quantize)
            yield _pack_one(name, own[start : start + most])


def _pack_one(name: str, chains: Sequence[Micro]) -> Micro:
    def inputs() -> tuple[Tensor, ...]:
        return tuple(tensor for chain in chains for tensor in chain.inputs())

    return Micro(name, partial(Several, chains), inputs, chains[0].quantize, chains[0].target)


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
