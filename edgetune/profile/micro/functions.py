"""Chains of functions of activations, and of kernels that no backend takes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.profile.micro.program import INT4, INT8, Function, LayerChain, Micro, chain_of, floats, quantized_name

_SIZES: tuple[tuple[int, ...], ...] = ((1, 16, 64), (1, 64, 384), (1, 256, 1024))
_ENDS = _SIZES[::2]
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
    """Both products of attention."""
    return (
        chain_of("scores", lambda q, k: torch.bmm(q, k), (heads, rows, wide), (heads, wide, rows)),
        chain_of("values", lambda p, v: torch.bmm(p, v), (heads, rows, rows), (heads, rows, wide)),
    )


def _softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def _split_heads(x: Tensor) -> Tensor:
    """Transposed there and back, with an operator between, or the compiler removes both."""
    return x.transpose(1, 2).abs().transpose(1, 2).abs()


def _transpose_and_back(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).abs().transpose(-1, -2).abs()


def _to_channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).abs().permute(0, 3, 1, 2).abs()


def _to_channels_last_int8(x: Tensor) -> Tensor:
    """With an operator that is quantized."""
    y = x.permute(0, 2, 3, 1)
    y = y + y
    y = y.permute(0, 3, 1, 2)
    return y + y


def _reshape(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1).abs().reshape(x.shape).abs()


def swap_halves(x: Tensor) -> Tensor:
    """Two slices and their concatenation."""
    half = x.shape[1] // 2
    return torch.cat((x[:, half:], x[:, :half]), 1)


def _join_quarters(x: Tensor) -> Tensor:
    quarter = x.shape[-1] // 4
    return torch.cat([x[..., i * quarter : (i + 1) * quarter].abs() for i in range(4)], -1)


def _sum_slices(x: Tensor) -> Tensor:
    """Thin slices, as a recurrence takes them."""
    total = x[:, :, 0]
    for step in range(1, x.shape[2]):
        total = total + x[:, :, step]
    return total


def _pad(x: Tensor) -> Tensor:
    return functional.pad(x, (1, 1, 1, 1)).abs()


def max_pool(x: Tensor) -> Tensor:
    """Max pooling that keeps the size."""
    return functional.max_pool2d(x, 3, 1, 1)


def _average(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 2, 2)


def _resize(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def _center(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _scale_by_mean(x: Tensor) -> Tensor:
    return x * x.mean((2, 3), keepdim=True)


_BATCHED = (
    ((16, 4, 64), (16, 64, 128)), ((64, 1, 64), (64, 64, 128)), ((128, 1, 16), (128, 16, 1)),
    ((16, 64, 32), (16, 32, 1)), ((24, 128, 96), (24, 96, 1)), ((32, 256, 64), (32, 64, 1)),
    ((8, 64, 256), (8, 256, 1)),
)  # fmt: skip


def functions() -> Iterator[Micro]:
    """Delegated operators without weights."""
    for name, function in _UNARY.items():
        yield from (chain_of(name, function, size, times=8) for size in _SIZES)
    for name, function in _BINARY.items():
        yield from (chain_of(name, function, size, size, times=8) for size in _SIZES)
        yield chain_of(f"{name}-row", function, (1, 128, 384), (1, 1, 384), times=8)
    yield from (chain_of(n, _BINARY[n], s, s, times=4, quantize=INT8) for n in ("add", "multiply") for s in _ENDS)
    yield from (chain_of("hardswish", functional.hardswish, s, times=4, quantize=INT8) for s in ((1, 1, 16), *_ENDS))
    for shape in ((1, 64, 1, 1), (1, 256, 4, 4), (1, 64, 16, 16), (1, 16, 32, 32), (1, 96, 56, 56)):
        yield chain_of("channels-last", _to_channels_last, shape, times=4)
        yield chain_of("channels-last", _to_channels_last_int8, shape, times=2, quantize=INT8)
        yield chain_of("squeezed", _scale_by_mean, shape, times=4)
    yield chain_of("multiply-image", torch.mul, (1, 64, 16, 16), (1, 64, 1, 1), times=8)
    yield chain_of("multiply-scalar", lambda x: x * 1.01, (1, 16, 64), times=8)
    for heads, rows, wide in ((2, 16, 32), (4, 64, 32), (12, 64, 32), (3, 196, 64), (9, 128, 64)):
        yield from _attention(heads, rows, wide)
    for left, right in _BATCHED:
        yield chain_of("batched", torch.bmm, left, right)
    yield from (chain_of("softmax", _softmax, s, times=4) for s in ((2, 16, 16), (12, 64, 64), (3, 196, 196)))
    for shape in ((1, 16, 2, 32), (1, 64, 12, 32), (1, 196, 3, 64), (1, 96, 4, 4)):
        yield chain_of("heads", _split_heads, shape, times=4)
        yield chain_of("turned", _transpose_and_back, shape, times=4)
        yield chain_of("reshaped", _reshape, shape, times=4)
    for text in ((1, 32, 64), (1, 128, 384)):
        yield chain_of("halves", swap_halves, text, times=4)
        yield chain_of("quarters", _join_quarters, text, times=4)
    yield chain_of("quarters", _join_quarters, (1, 64, 4, 16), times=4)
    for averaged in ((1, 32, 64), (1, 128, 384), (1, 128, 4), (1, 1024, 16)):
        yield chain_of("centered", _center, averaged, times=4)
    yield from (chain_of("steps", _sum_slices, shape) for shape in ((1, 128, 16, 8), (1, 512, 8, 4)))
    for shape in ((1, 16, 16, 16), (1, 64, 28, 28)):
        yield chain_of("halves", swap_halves, shape, times=2)
        yield chain_of("padded", _pad, shape)
        yield chain_of("max-pool", max_pool, shape, times=2)
        yield chain_of("average-pool", _average, shape)
        yield chain_of("resized", _resize, shape)


# What no backend takes


def _layer_norm(rows: int, wide: int, times: int) -> Micro:
    def module() -> nn.Module:
        return LayerChain([nn.LayerNorm(wide) for _ in range(times)])

    return Micro(f"layer-norm-{rows}x{wide}", module, floats((1, rows, wide)))


def _embedding(rows: int, words: int, wide: int, quantize: str = "") -> Micro:
    def tokens() -> tuple[Tensor, ...]:
        return (torch.randint(0, words, (1, rows), generator=torch.Generator().manual_seed(0)),)

    name = quantized_name(f"embedding-{rows}x{wide}", quantize)
    # int4 needs a linear layer, and quantizes the table with it
    return Micro(name, lambda: LayerChain([nn.Embedding(words, wide), nn.Linear(wide, wide)]), tokens, quantize)


def _mask(x: Tensor) -> Tensor:
    return torch.where(x > 0.5, x, 0.25)


def _select_repeatedly(x: Tensor, y: Tensor) -> Tensor:
    """One comparison and many selections, so that their costs can be separated."""
    mask = x > 0.5
    for _ in range(8):
        x = torch.where(mask, y, x)
    return x


def _join_masks(x: Tensor) -> Tensor:
    low, high = x > 0.2, x < 0.9
    for _ in range(8):
        low = low & high
    return low.to(torch.float32)


def _reverse_columns(x: Tensor) -> Tensor:
    return x[:, torch.arange(x.shape[1] - 1, -1, -1)]


def _reverse_rows(x: Tensor) -> Tensor:
    return x[torch.arange(x.shape[0] - 1, -1, -1)]


def _split_and_join(x: Tensor) -> Tensor:
    return torch.cat(torch.split(x, [x.shape[1] // 4, x.shape[1] - x.shape[1] // 4], 1)[::-1], 1)


def _spread(x: Tensor) -> Tensor:
    return x[:, :, :1].expand(x.shape).contiguous()


def _within_bounds(x: Tensor) -> Tensor:
    return ((x > 0.2) & (x < 0.9)).to(torch.float32)


_NORMS = ((16, 64, 8), (64, 384, 4), (196, 192, 4), (256, 32, 4), (16, 512, 4), (128, 256, 4))


def kernels() -> Iterator[Micro]:
    """Portable kernels: one thread of loops each."""
    yield from (_layer_norm(*shape) for shape in _NORMS)
    yield from (_embedding(rows, 1024, wide, q) for rows, wide in ((16, 64), (64, 384)) for q in ("", INT4))
    sizes = ((1, 16, 64), (1, 64, 384))
    functions = {"add": lambda x: x + x, "negate": torch.neg, "cumsum": lambda x: torch.cumsum(x, -1),
                 "where": _mask, "picked": _reverse_columns, "both": _within_bounds,
                 "top": lambda x: torch.topk(x, 2, -1)[0],
                 "heads": lambda x: x.transpose(1, 2).contiguous(), "softmax": _softmax,
                 "joined": _join_masks, "split": _split_and_join, "spread": _spread,
                 "filled": lambda x: torch.full_like(x, 1.5) + x,
                 "largest": lambda x: x.amax(-1, keepdim=True) + x}  # fmt: skip
    for name, function in functions.items():
        times = 1 if name in ("top", "both", "joined", "heads", "spread") else 4
        yield from (chain_of(name, function, size, times=times, target="portable") for size in sizes)
    yield from (chain_of("selected", _select_repeatedly, size, size, target="portable") for size in sizes)
    yield from (chain_of("least", torch.minimum, size, size, times=4, target="portable") for size in sizes)
    yield from (
        chain_of("gathered", _reverse_rows, size, target="portable")
        for size in ((16, 64, 128), (32, 64, 32), (48, 128, 96))
    )
    yield chain_of("matmul", torch.bmm, (2, 16, 32), (2, 32, 16), target="portable")
    yield chain_of("matmul", torch.bmm, (9, 64, 64), (9, 64, 64), target="portable")
