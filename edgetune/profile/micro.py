"""Micro-programs for a calibration: chains of one operator each, in the sizes and types of models for small devices.

A chain, because one small operator is over before it can be told from the call around it, and because in a model an
operator finds its weights as the operators before it left the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

CHAIN = 33  # operators in the long tiny programs, from which the cost of one is told
INT4, INT8 = "int4", "int8"

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Micro:
    """A program to time. `quantize`: recipe name of the technique applied before lowering, or nothing."""

    name: str
    module: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    quantize: str = ""
    target: str = "xnnpack"


class _Calls(nn.Module):
    """A function as a module, called again and again on its own result."""

    def __init__(self, function: Function, times: int = 1) -> None:
        super().__init__()
        self.function, self.times = function, times

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """Call it `times` times."""
        for _ in range(self.times):
            x = self.function(x, *others)
        return x


class _Layers(nn.Module):
    """Layers one after the other, under a name: parameter names that begin with a digit break the lowering."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Call them."""
        result: Tensor = self.layers(x)
        return result


def _floats(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(shape, generator=torch.Generator().manual_seed(0)).abs() + 0.1 for shape in shapes)


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


# Layers with weights


def _linear(rows: int, wide: int, out: int, pairs: int, quantize: str = "") -> Micro:
    """`pairs` times wide -> out -> wide."""

    def module() -> nn.Module:
        return _Layers([layer for _ in range(pairs) for layer in (nn.Linear(wide, out), nn.Linear(out, wide))])

    return Micro(_named(f"linear-{rows}x{wide}x{out}", quantize), module, _floats((rows, wide)), quantize)


def _pointwise(wide: int, out: int, size: int, pairs: int, quantize: str = "") -> Micro:
    def module() -> nn.Module:
        return _Layers([layer for _ in range(pairs) for layer in (nn.Conv2d(wide, out, 1), nn.Conv2d(out, wide, 1))])

    return Micro(_named(f"pointwise-{wide}x{out}x{size}", quantize), module, _floats((1, wide, size, size)), quantize)


def _conv(wide: int, size: int, kernel: int, times: int, groups: int = 1, quantize: str = "") -> Micro:
    """`times` convolutions that keep channels and size, as many groups as told."""
    kind = "depthwise" if groups == wide else "conv" if groups == 1 else f"conv-of-{groups}"

    def module() -> nn.Module:
        made = [nn.Conv2d(wide, wide, kernel, padding=kernel // 2, groups=groups) for _ in range(times)]
        return _Layers(made)

    name = _named(f"{kind}-{kernel}-{wide}x{size}", quantize)
    return Micro(name, module, _floats((1, wide, size, size)), quantize)


def _stem(out: int, size: int, kernel: int, stride: int, quantize: str = "") -> Micro:
    """The first convolution of a network: three channels in."""

    def module() -> nn.Module:
        return _Layers([nn.Conv2d(3, out, kernel, stride, kernel // 2)])

    return Micro(_named(f"stem-{kernel}-{out}x{size}", quantize), module, _floats((1, 3, size, size)), quantize)


def _strided(wide: int, size: int, kernel: int, quantize: str = "") -> Micro:
    def module() -> nn.Module:
        return _Layers([nn.Conv2d(wide, wide, kernel, 2, kernel // 2, groups=wide)])

    return Micro(_named(f"strided-{kernel}-{wide}x{size}", quantize), module, _floats((1, wide, size, size)), quantize)


def _upward(wide: int, out: int, size: int, quantize: str = "") -> Micro:
    def module() -> nn.Module:
        return _Layers([nn.ConvTranspose2d(wide, out, 2, 2)])

    return Micro(_named(f"upward-{wide}x{out}x{size}", quantize), module, _floats((1, wide, size, size)), quantize)


class _Shifted(nn.Module):
    """Convolutions with an addition between them that keeps the order of the axes: a transpose before and after."""

    def __init__(self, wide: int, times: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(wide, wide, 1) for _ in range(times)])

    def forward(self, x: Tensor) -> Tensor:
        """Call them."""
        for layer in self.layers:
            x = layer(x) + 3.0
        return x


def _shifted(wide: int, size: int, quantize: str = "") -> Micro:
    name = _named(f"shifted-{wide}x{size}", quantize)
    return Micro(name, partial(_Shifted, wide, 4), _floats((1, wide, size, size)), quantize)


def _named(name: str, quantize: str) -> str:
    return f"{name}-{quantize}" if quantize else name


_LINEAR = (
    (1, 64, 64, 8), (1, 256, 1024, 2), (1, 576, 1536, 2), (1, 1280, 1024, 1), (1, 1024, 4096, 2),
    (7, 256, 256, 2), (5, 256, 256, 2), (8, 128, 128, 4), (12, 256, 256, 2), (16, 64, 64, 8), (16, 64, 256, 4),
    (16, 192, 768, 2), (16, 576, 1536, 1), (32, 256, 32, 4), (64, 64, 64, 4), (64, 384, 384, 2), (64, 384, 1536, 1), (128, 192, 768, 1),
    (128, 576, 1536, 1), (196, 192, 576, 1), (256, 32, 128, 4), (16, 512, 2048, 2), (16, 1024, 4096, 2),
    (64, 512, 2048, 2),
)  # fmt: skip
_LINEAR_INT8 = ((1, 64, 64, 8), (1, 1280, 1024, 1), (16, 64, 256, 4), (16, 192, 768, 2), (64, 64, 64, 4),
                (64, 384, 1536, 1), (196, 192, 576, 1), (256, 32, 128, 4))  # fmt: skip
_POINTWISE = (
    (8, 32, 1, 8), (64, 256, 1, 4), (256, 1024, 1, 2), (128, 128, 4, 4), (48, 288, 4, 4), (192, 384, 7, 2),
    (320, 1280, 7, 1), (16, 96, 16, 4), (64, 128, 14, 2), (24, 144, 28, 2), (16, 64, 32, 2), (96, 24, 56, 1),
    (16, 16, 64, 2), (32, 96, 112, 1), (256, 1024, 2, 4), (128, 512, 4, 8), (512, 512, 4, 6), (1024, 1024, 4, 5),
)  # fmt: skip
_POINTWISE_INT8 = (
    (8, 32, 1, 8), (64, 256, 1, 4), (256, 1024, 1, 2), (128, 128, 4, 4), (192, 384, 7, 2), (320, 1280, 7, 1),
    (64, 128, 14, 2), (16, 64, 32, 2), (96, 24, 56, 1), (256, 1024, 2, 4), (128, 512, 4, 8), (512, 512, 4, 6),
)  # fmt: skip
_CONV = (
    (16, 32, 3, 2), (32, 16, 3, 2), (64, 8, 3, 2), (128, 8, 3, 2), (256, 4, 3, 4), (512, 2, 3, 2), (512, 4, 3, 4), (64, 28, 3, 2),
    (128, 14, 3, 1), (32, 56, 3, 1), (16, 16, 5, 2),
)  # fmt: skip
_DEPTHWISE = (
    (16, 32, 3, 4), (64, 16, 3, 4), (128, 8, 3, 4), (512, 4, 3, 4), (96, 56, 3, 2), (192, 28, 3, 2), (576, 14, 3, 2),
    (16, 16, 5, 4), (64, 8, 5, 4), (240, 14, 5, 2), (32, 32, 7, 2), (64, 8, 7, 4), (256, 4, 7, 4),
)  # fmt: skip


def _layers() -> Iterator[Micro]:
    """Everything that has weights, in floating point and quantized."""
    yield from (_linear(*shape) for shape in _LINEAR)
    yield from (_linear(*shape, quantize=INT4) for shape in _LINEAR[::2])
    yield from (_linear(*shape, quantize=INT8) for shape in _LINEAR_INT8)
    for quantize in ("", INT8):
        yield from (_pointwise(*shape, quantize=quantize) for shape in (_POINTWISE_INT8 if quantize else _POINTWISE))
        yield from (_conv(wide, size, k, times, quantize=quantize) for wide, size, k, times in _CONV)
        yield from (_conv(wide, size, k, times, wide, quantize) for wide, size, k, times in _DEPTHWISE)
        yield _conv(64, 16, 3, 2, 4, quantize)
        yield _conv(128, 14, 3, 2, 32, quantize)
        yield from (_stem(*shape, quantize=quantize) for shape in ((16, 64, 3, 2), (32, 224, 3, 2), (32, 64, 7, 4)))
        yield from (_strided(*shape, quantize=quantize) for shape in ((96, 56, 3), (64, 16, 5), (64, 32, 7)))
        yield from (_shifted(*shape, quantize=quantize) for shape in ((64, 1), (16, 32), (128, 7)))
        yield from (_upward(*shape, quantize=quantize) for shape in ((64, 64, 8), (32, 32, 16)))


# Functions


def _call(
    name: str, function: Function, *shapes: tuple[int, ...], times: int = 1, quantize: str = "", target: str = "xnnpack"
) -> Micro:
    ending = "-portable" if target == "portable" else ""
    full = _named(f"{name}-{_by(shapes[0])}{ending}", quantize)
    return Micro(full, partial(_Calls, function, times), _floats(*shapes), quantize, target)


_SIZES: tuple[tuple[int, ...], ...] = ((1, 16, 64), (1, 256, 1024))
_UNARY: dict[str, Function] = {
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(0.0, 6.0),
    "exp": lambda x: torch.exp(-x),  # stays finite, at the price of a negation
    "gelu": functional.gelu,
    "hardswish": functional.hardswish,
    "leaky-relu": lambda x: functional.leaky_relu(x, 0.1),
    "log": lambda x: torch.log(x.abs()),
    "negate": torch.neg,
    "rsqrt": torch.rsqrt,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
_BINARY: dict[str, Function] = {"add": torch.add, "multiply": torch.mul, "subtract": torch.sub, "divide": torch.div}


def _attention(heads: int, rows: int, wide: int) -> tuple[Micro, Micro]:
    """Scores and their use: two products of activations."""
    return (
        _call("scores", lambda q, k: torch.bmm(q, k), (heads, rows, wide), (heads, wide, rows)),
        _call("values", lambda p, v: torch.bmm(p, v), (heads, rows, rows), (heads, rows, wide)),
    )


def _softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def _split_heads(x: Tensor) -> Tensor:
    """Transposed there and back with something between, or the compiler takes both out."""
    return x.transpose(1, 2).abs().transpose(1, 2).abs()


def _turned(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).abs().transpose(-1, -2).abs()


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).abs().permute(0, 3, 1, 2).abs()


def _reshaped(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1).abs().reshape(x.shape).abs()


def _halves(x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return torch.cat((x[:, half:], x[:, :half]), 1)


def _quarters(x: Tensor) -> Tensor:
    quarter = x.shape[-1] // 4
    return torch.cat([x[..., i * quarter : (i + 1) * quarter].abs() for i in range(4)], -1)


def _steps(x: Tensor) -> Tensor:
    """Thin slices out of the middle, as a recurrence takes them."""
    total = x[:, :, 0]
    for step in range(1, x.shape[2]):
        total = total + x[:, :, step]
    return total


def _padded(x: Tensor) -> Tensor:
    return functional.pad(x, (1, 1, 1, 1)).abs()


def _pooled(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, 1, 1)


def _averaged(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 2, 2)


def _resized(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def _centered(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _squeezed(x: Tensor) -> Tensor:
    return x * x.mean((2, 3), keepdim=True)


def _functions() -> Iterator[Micro]:
    """What has no weights and goes to XNNPACK."""
    for name, function in _UNARY.items():
        yield from (_call(name, function, size, times=8) for size in _SIZES)
    for name, function in _BINARY.items():
        yield from (_call(name, function, size, size, times=8) for size in _SIZES)
        yield _call(f"{name}-row", function, (1, 128, 384), (1, 1, 384), times=8)
    yield from (_call(n, _BINARY[n], s, s, times=4, quantize=INT8) for n in ("add", "multiply") for s in _SIZES)
    yield from (_call("hardswish", functional.hardswish, s, times=4, quantize=INT8) for s in ((1, 1, 16), *_SIZES))
    for shape in ((1, 64, 1, 1), (1, 256, 4, 4), (1, 64, 16, 16), (1, 16, 32, 32), (1, 96, 56, 56)):
        yield _call("channels-last", _channels_last, shape, times=4)
        yield _call("squeezed", _squeezed, shape, times=4)
    yield _call("multiply-image", torch.mul, (1, 64, 16, 16), (1, 64, 1, 1), times=8)
    yield _call("multiply-scalar", lambda x: x * 1.01, (1, 16, 64), times=8)
    for heads, rows, wide in ((2, 16, 32), (4, 64, 32), (12, 64, 32), (3, 196, 64), (9, 128, 64)):
        yield from _attention(heads, rows, wide)
    for left, right in (((16, 4, 64), (16, 64, 128)), ((64, 1, 64), (64, 64, 128)), ((128, 1, 16), (128, 16, 1))):
        yield _call("batched", torch.bmm, left, right)
    yield from (_call("softmax", _softmax, s, times=4) for s in ((2, 16, 16), (12, 64, 64), (3, 196, 196)))
    for shape in ((1, 16, 2, 32), (1, 64, 12, 32), (1, 196, 3, 64)):
        yield _call("heads", _split_heads, shape, times=4)
        yield _call("turned", _turned, shape, times=4)
        yield _call("reshaped", _reshaped, shape, times=4)
    for shape in ((1, 32, 64), (1, 128, 384)):
        yield _call("halves", _halves, shape, times=4)
        yield _call("quarters", _quarters, shape, times=4)
        yield _call("centered", _centered, shape, times=4)
    yield from (_call("steps", _steps, shape) for shape in ((1, 128, 16, 8), (1, 512, 8, 4)))
    for shape in ((1, 16, 16, 16), (1, 64, 28, 28)):
        yield _call("halves", _halves, shape, times=2)
        yield _call("padded", _padded, shape)
        for quantize in ("", INT8):
            yield _call("max-pool", _pooled, shape, times=2, quantize=quantize)
        yield _call("average-pool", _averaged, shape)
        yield _call("resized", _resized, shape)


# What no backend takes


def _layer_norm(rows: int, wide: int, times: int) -> Micro:
    def module() -> nn.Module:
        return _Layers([nn.LayerNorm(wide) for _ in range(times)])

    return Micro(f"layer-norm-{rows}x{wide}", module, _floats((1, rows, wide)))


def _embedding(rows: int, words: int, wide: int, quantize: str = "") -> Micro:
    def tokens() -> tuple[Tensor, ...]:
        return (torch.randint(0, words, (1, rows), generator=torch.Generator().manual_seed(0)),)

    name = _named(f"embedding-{rows}x{wide}", quantize)
    # int4 wants a linear layer, and takes the table with it
    return Micro(name, lambda: _Layers([nn.Embedding(words, wide), nn.Linear(wide, wide)]), tokens, quantize)


def _masked(x: Tensor) -> Tensor:
    return torch.where(x > 0.5, x, 0.25)


def _picked(x: Tensor) -> Tensor:
    return x[:, torch.arange(x.shape[1] - 1, -1, -1)]


def _gathered(x: Tensor) -> Tensor:
    return x[torch.arange(x.shape[0] - 1, -1, -1)]


def _both(x: Tensor) -> Tensor:
    return ((x > 0.2) & (x < 0.9)).to(torch.float32)


def _kernels() -> Iterator[Micro]:
    """Portable kernels: one thread of loops each."""
    yield from (_layer_norm(*shape) for shape in ((16, 64, 8), (64, 384, 4), (196, 192, 4), (256, 32, 4)))
    yield from (_embedding(rows, 1024, wide, q) for rows, wide in ((16, 64), (64, 384)) for q in ("", INT4))
    sizes = ((1, 16, 64), (1, 64, 384))
    functions = {"add": lambda x: x + x, "negate": torch.neg, "cumsum": lambda x: torch.cumsum(x, -1),
                 "where": _masked, "picked": _picked, "both": _both, "top": lambda x: torch.topk(x, 2, -1)[0],
                 "heads": lambda x: x.transpose(1, 2).contiguous(), "softmax": _softmax,
                 "largest": lambda x: x.amax(-1, keepdim=True) + x}  # fmt: skip
    for name, function in functions.items():
        times = 1 if name in ("top", "both", "heads") else 4
        yield from (_call(name, function, size, times=times, target="portable") for size in sizes)
    yield from (_call("gathered", _gathered, size, target="portable") for size in ((16, 64, 128), (32, 64, 32)))
    yield _call("matmul", torch.bmm, (2, 16, 32), (2, 32, 16), target="portable")
    yield _call("matmul", torch.bmm, (9, 64, 64), (9, 64, 64), target="portable")


def _tiny(name: str, function: Function, times: int) -> Micro:
    return Micro(name, lambda: _Calls(function, times), _floats((1, 16)))


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


def _alternating(x: Tensor) -> Tensor:
    """A part for the backend and a kernel outside, so that each of them is a call."""
    return torch.cumsum(x.abs(), -1)


def _parts() -> Iterator[Micro]:
    """Many calls of the backend in one program."""
    yield _call("parts", _alternating, (1, 16), times=8)
    yield _call("parts", _alternating, (1, 16, 64), times=8)


def quick() -> tuple[Micro, ...]:
    """The few that show a calibration to work."""
    return (_linear(64, 256, 256, 1), _linear(64, 512, 512, 1), _call("add", torch.add, (1, 65536), (1, 65536)))


def programs() -> tuple[Micro, ...]:
    """All of a calibration, beside the tiny ones: sizes as they occur in small language and vision models."""
    return (*_layers(), *_functions(), *_kernels(), *_parts())
