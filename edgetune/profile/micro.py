"""Micro-programs for a calibration: one operator each, in several sizes and types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CHAIN = 33  # operators in the long tiny programs, from which the cost of one is told


@dataclass(frozen=True)
class Micro:
    """A program to time. `quantize`: recipe name of the technique applied before lowering, or nothing."""

    name: str
    module: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    quantize: str = ""
    target: str = "xnnpack"


class _Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        """Call it."""
        return self.function(*inputs)


class _Chain(nn.Module):
    """The same operator again and again, each on the result of the last."""

    def __init__(self, function: Callable[[Tensor], Tensor], times: int) -> None:
        super().__init__()
        self.function, self.times = function, times

    def forward(self, x: Tensor) -> Tensor:
        """Call it `times` times."""
        for _ in range(self.times):
            x = self.function(x)
        return x


class _Layer(nn.Module):
    """A layer under a name: parameter names that begin with a digit break the lowering."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Call it."""
        result: Tensor = self.layer(x)
        return result


def _floats(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes)


def _tiny(name: str, function: Callable[[Tensor], Tensor], times: int) -> Micro:
    return Micro(name, lambda: _Chain(function, times), _floats((1, 16)))


def tiny() -> tuple[Micro, Micro, Micro, Micro]:
    """One and many tiny operators: those that XNNPACK takes (abs), then those that it leaves (cumsum)."""

    def portable(x: Tensor) -> Tensor:
        return torch.cumsum(x, -1)

    return (
        _tiny("tiny-delegated-1", torch.abs, 1),
        _tiny(f"tiny-delegated-{CHAIN}", torch.abs, CHAIN),
        _tiny("tiny-portable-1", portable, 1),
        _tiny(f"tiny-portable-{CHAIN}", portable, CHAIN),
    )


def _linear(rows: int, wide: int, out: int, quantize: str = "") -> Micro:
    name = f"linear-{rows}x{wide}x{out}" + (f"-{quantize}" if quantize else "")
    return Micro(name, lambda: _Layer(nn.Linear(wide, out)), _floats((rows, wide)), quantize)


def _conv(wide: int, out: int, size: int, kernel: int, groups: int = 1, quantize: str = "") -> Micro:
    kind = "depthwise" if groups > 1 else "pointwise" if kernel == 1 else "conv"
    name = f"{kind}-{wide}x{out}x{size}" + (f"-{quantize}" if quantize else "")

    def module() -> nn.Module:
        return _Layer(nn.Conv2d(wide, out, kernel, padding=kernel // 2, groups=groups))

    return Micro(name, module, _floats((1, wide, size, size)), quantize)


def _call(name: str, function: Callable[..., Tensor], *shapes: tuple[int, ...], target: str = "xnnpack") -> Micro:
    name += "-portable" if target == "portable" else ""
    return Micro(name, lambda: _Calls(function), _floats(*shapes), target=target)


def _embedding(rows: int, words: int, wide: int) -> Micro:
    def tokens() -> tuple[Tensor, ...]:
        return (torch.randint(0, words, (1, rows), generator=torch.Generator().manual_seed(0)),)

    return Micro(f"embedding-{rows}x{wide}", lambda: _Layer(nn.Embedding(words, wide)), tokens)


def _normalization(rows: int, wide: int) -> Micro:
    return Micro(f"layer-norm-{rows}x{wide}", lambda: _Layer(nn.LayerNorm(wide)), _floats((1, rows, wide)))


def _softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def _mean(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def _transpose(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def quick() -> tuple[Micro, ...]:
    """The few that show a calibration to work."""
    return (_linear(64, 256, 256), _linear(64, 512, 512), _call("add-65536", torch.add, (1, 65536), (1, 65536)))


def programs() -> tuple[Micro, ...]:
    """All of a calibration, beside the tiny ones: sizes as they occur in small language and vision models."""
    linear = ((1, 576, 1536), (64, 384, 384), (64, 384, 1536), (128, 576, 1536), (1, 1280, 1000))
    convolutions = ((3, 32, 112, 3), (32, 64, 56, 3), (128, 128, 14, 3))
    pointwise = ((32, 96, 56, 1), (96, 24, 56, 1), (192, 64, 28, 1), (320, 1280, 7, 1))
    depthwise = ((96, 96, 56, 3, 96), (192, 192, 28, 3, 192), (576, 576, 14, 3, 576))
    return (
        *(_linear(*shape) for shape in linear),
        *(_linear(*shape, quantize="int4") for shape in linear[:4]),
        *(_conv(*shape) for shape in (*convolutions, *pointwise, *depthwise)),
        _call("matmul-64", torch.bmm, (12, 64, 32), (12, 32, 64)),
        _call("matmul-128", torch.bmm, (9, 128, 128), (9, 128, 64)),
        _call("add-24576", torch.add, (1, 64, 384), (1, 64, 384)),
        _call("add-602112", torch.add, (1, 192, 56, 56), (1, 192, 56, 56)),
        _call("gelu-98304", nn.functional.gelu, (1, 64, 1536)),
        _call("sigmoid-196608", torch.sigmoid, (1, 128, 1536)),
        _embedding(64, 8192, 384),
        _embedding(256, 8192, 576),
        _normalization(64, 384),
        _normalization(256, 576),
        _call("softmax-64", _softmax, (1, 12, 64, 64)),
        _call("softmax-256", _softmax, (1, 9, 256, 256)),
        _call("mean-56", _mean, (1, 96, 56, 56)),
        _call("mean-7", _mean, (1, 1280, 7, 7)),
        _call("transpose-64", _transpose, (1, 64, 12, 32)),
        _call("transpose-256", _transpose, (1, 256, 9, 64)),
        _call("add-24576", torch.add, (1, 64, 384), (1, 64, 384), target="portable"),
        _call("add-196608", torch.add, (1, 128, 1536), (1, 128, 1536), target="portable"),
        _call("matmul-64", torch.bmm, (12, 64, 32), (12, 32, 64), target="portable"),
        _call("matmul-128", torch.bmm, (9, 128, 64), (9, 64, 128), target="portable"),
    )
