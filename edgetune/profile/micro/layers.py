"""Chains of layers that have weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor, nn

from edgetune.profile.micro.functions import max_pool, swap_halves
from edgetune.profile.micro.program import INT4, INT8, Function, LayerChain, Micro, floats, quantized_name


def linear(rows: int, wide: int, out: int, pairs: int, quantize: str = "") -> Micro:
    """`pairs` times wide -> out -> wide."""

    def module() -> nn.Module:
        return LayerChain([layer for _ in range(pairs) for layer in (nn.Linear(wide, out), nn.Linear(out, wide))])

    return Micro(quantized_name(f"linear-{rows}x{wide}x{out}", quantize), module, floats((rows, wide)), quantize)


def _images(name: str, channels: int, size: int, layers: Callable[[], Sequence[nn.Module]], quantize: str) -> Micro:
    """A chain of layers on one image."""
    full = quantized_name(f"{name}x{size}", quantize)
    return Micro(full, lambda: LayerChain(layers()), floats((1, channels, size, size)), quantize)


def _pointwise(wide: int, out: int, size: int, pairs: int, quantize: str = "") -> Micro:
    def layers() -> list[nn.Module]:
        return [layer for _ in range(pairs) for layer in (nn.Conv2d(wide, out, 1), nn.Conv2d(out, wide, 1))]

    return _images(f"pointwise-{wide}x{out}", wide, size, layers, quantize)


def _conv(wide: int, size: int, kernel: int, times: int, groups: int = 1, quantize: str = "") -> Micro:
    """`times` convolutions that keep channels and size."""
    kind = "depthwise" if groups == wide else "conv" if groups == 1 else f"conv-of-{groups}"

    def layers() -> list[nn.Module]:
        return [nn.Conv2d(wide, wide, kernel, padding=kernel // 2, groups=groups) for _ in range(times)]

    return _images(f"{kind}-{kernel}-{wide}", wide, size, layers, quantize)


def _stem(out: int, size: int, kernel: int, stride: int, quantize: str = "") -> Micro:
    """The first convolution of a network: three channels in."""
    return _images(f"stem-{kernel}-{out}", 3, size, lambda: [nn.Conv2d(3, out, kernel, stride, kernel // 2)], quantize)


def _strided_conv(wide: int, size: int, kernel: int, quantize: str = "") -> Micro:
    def layers() -> list[nn.Module]:
        return [nn.Conv2d(wide, wide, kernel, 2, kernel // 2, groups=wide)]

    return _images(f"strided-{kernel}-{wide}", wide, size, layers, quantize)


def _transposed_conv(wide: int, out: int, size: int, quantize: str = "") -> Micro:
    return _images(f"upward-{wide}x{out}", wide, size, lambda: [nn.ConvTranspose2d(wide, out, 2, 2)], quantize)


class _Between(nn.Module):
    """Convolutions with a function after each, in the memory order that convolutions leave."""

    def __init__(self, function: Function, wide: int, times: int) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList([nn.Conv2d(wide, wide, 1) for _ in range(times)])

    def forward(self, x: Tensor) -> Tensor:
        """Call them."""
        for layer in self.layers:
            x = self.function(layer(x))
        return x


def _add_constant(x: Tensor) -> Tensor:
    """Keeps the order of axes, with a transpose before and after."""
    return x + 3.0


def _shuffle_channels(x: Tensor) -> Tensor:
    """The channels of two halves in turn (Zhang et al. 2018, section 3.1)."""
    return x.reshape(x.shape[0], 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


_BETWEEN: dict[str, Function] = {
    "shifted": _add_constant,
    "shuffled": _shuffle_channels,
    "swapped": swap_halves,
    "pooled": max_pool,
}


def _between(name: str, wide: int, size: int, quantize: str) -> Micro:
    full = quantized_name(f"{name}-{wide}x{size}", quantize)
    return Micro(full, partial(_Between, _BETWEEN[name], wide, 4), floats((1, wide, size, size)), quantize)


_LINEAR = (
    (1, 64, 64, 8), (1, 256, 1024, 2), (1, 576, 1536, 2), (1, 1280, 1024, 1), (1, 1024, 4096, 2),
    (7, 256, 256, 2), (5, 256, 256, 2), (8, 128, 128, 4), (12, 256, 256, 2), (16, 64, 64, 8), (16, 64, 256, 4),
    (16, 192, 768, 2), (16, 576, 1536, 1), (32, 256, 32, 4), (64, 64, 64, 4), (64, 384, 384, 2), (64, 384, 1536, 1),
    (128, 192, 768, 1), (128, 576, 1536, 1), (196, 192, 576, 1), (256, 32, 128, 4), (16, 512, 2048, 2),
    (16, 1024, 4096, 2), (64, 512, 2048, 2),
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
    (16, 32, 3, 2), (32, 16, 3, 2), (64, 8, 3, 2), (128, 8, 3, 2), (256, 4, 3, 4), (512, 2, 3, 2), (512, 4, 3, 4),
    (64, 28, 3, 2), (128, 14, 3, 1), (32, 56, 3, 1), (16, 16, 5, 2),
)  # fmt: skip
_DEPTHWISE = (
    (16, 32, 3, 4), (64, 16, 3, 4), (128, 8, 3, 4), (512, 4, 3, 4), (96, 56, 3, 2), (192, 28, 3, 2), (576, 14, 3, 2),
    (16, 16, 5, 4), (64, 8, 5, 4), (240, 14, 5, 2), (32, 32, 7, 2), (64, 8, 7, 4), (256, 4, 7, 4),
)  # fmt: skip


def layers() -> Iterator[Micro]:
    """Everything that has weights, in floating point and quantized."""
    yield from (linear(*shape) for shape in _LINEAR)
    yield from (linear(*shape, quantize=INT4) for shape in _LINEAR[::2])
    yield from (linear(*shape, quantize=INT8) for shape in _LINEAR_INT8)
    for quantize in ("", INT8):
        yield from (_pointwise(*shape, quantize=quantize) for shape in (_POINTWISE_INT8 if quantize else _POINTWISE))
        yield from (_conv(wide, size, k, times, quantize=quantize) for wide, size, k, times in _CONV)
        yield from (_conv(wide, size, k, times, wide, quantize) for wide, size, k, times in _DEPTHWISE)
        for wide, size, groups in ((128, 14, 2), (64, 16, 4), (128, 14, 32), (64, 8, 8), (256, 7, 32)):
            yield _conv(wide, size, 3, 2, groups, quantize)
        yield from (_stem(*shape, quantize=quantize) for shape in ((16, 64, 3, 2), (32, 224, 3, 2), (32, 64, 7, 4)))
        yield from (_strided_conv(*shape, quantize=quantize) for shape in ((96, 56, 3), (64, 16, 5), (64, 32, 7)))
        yield from (_between("shifted", *shape, quantize) for shape in ((64, 1), (16, 32), (128, 7)))
        yield from (_between(n, *s, quantize) for n in ("shuffled", "swapped", "pooled") for s in ((16, 28), (64, 7)))
        yield from (_transposed_conv(*shape, quantize=quantize) for shape in ((64, 64, 8), (32, 32, 16)))
