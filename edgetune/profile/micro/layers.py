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


def _grouped_conv(wide: int, size: int, groups: int, quantize: str) -> Micro:
    """Two convolutions that keep channels and size."""

    def layers() -> list[nn.Module]:
        return [nn.Conv2d(wide, wide, 3, padding=1, groups=groups) for _ in range(2)]

    return _images(f"conv-of-{groups}-{wide}", wide, size, layers, quantize)


def _stem(out: int, size: int, kernel: int, stride: int, quantize: str = "") -> Micro:
    """The first convolution of a network: three channels in."""
    return _images(f"stem-{kernel}-{out}", 3, size, lambda: [nn.Conv2d(3, out, kernel, stride, kernel // 2)], quantize)


def _transposed_conv(wide: int, out: int, size: int, quantize: str = "") -> Micro:
    return _images(f"upward-{wide}x{out}", wide, size, lambda: [nn.ConvTranspose2d(wide, out, 2, 2)], quantize)


def _scaled(wide: int, size: int) -> Micro:
    """A norm of the channels that follows no convolution, as one value for each channel."""

    def layers() -> list[nn.Module]:
        return [nn.Conv2d(wide, wide, 1, groups=wide) for _ in range(2)]

    return _images(f"scaled-{wide}", wide, size, layers, "")


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
    (1, 64, 64, 4), (1, 128, 256, 1), (7, 96, 96, 1), (16, 64, 64, 2), (64, 64, 64, 2), (12, 128, 128, 1),
    (256, 32, 128, 2),
)  # fmt: skip
_GROUPED = ((128, 14, 2), (64, 16, 4), (128, 14, 32), (64, 8, 8), (256, 7, 32))
_STEMS = ((16, 64, 3, 2), (32, 64, 7, 4), (24, 224, 3, 2))


def layers() -> Iterator[Micro]:
    """Layers with weights that the networks lack, or have only in sizes that no near cache holds."""
    for quantize in ("", INT4, INT8):
        yield from (linear(*shape, quantize=quantize) for shape in _LINEAR)
    yield from (_scaled(*shape) for shape in ((64, 56), (256, 28), (384, 14), (96, 8)))
    for quantize in ("", INT8):
        yield from (_grouped_conv(*shape, quantize=quantize) for shape in _GROUPED)
        yield from (_stem(*shape, quantize=quantize) for shape in _STEMS)
        yield from (_between("shifted", *shape, quantize) for shape in ((64, 1), (16, 32), (128, 7)))
        yield from (_between(n, *s, quantize) for n in ("shuffled", "swapped", "pooled") for s in ((16, 28), (64, 7)))
        yield from (_transposed_conv(*shape, quantize=quantize) for shape in ((64, 64, 8), (32, 32, 16)))
