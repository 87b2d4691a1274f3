"""Small forms of what backward needs: one bit, one byte, or one seed instead of a float."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

_GATHER = 0x0102040810204080  # a word of eight bytes 0 or 1, times this, has the eight bits in its highest byte
_SPREAD = 0x0101010101010101
_EACH = 0x8040201008040201 - 2**64  # bit i of byte i
_LANE = 2**16
_PIECE = 2**17  # elements worked on at once: half a MiB in fp32


def memory_order(x: Tensor) -> list[int]:
    """The dimensions by falling stride: permuted so, a dense tensor of any layout is contiguous."""
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda d: (-strides[d], d))


def flatten(x: Tensor, order: list[int]) -> Tensor:
    """The elements in this order of the dimensions, one after the other; a view where that is possible."""
    return x.permute(order).reshape(-1)


def unflatten(flat: Tensor, shape: torch.Size, order: list[int]) -> Tensor:
    """What `flatten` undoes: a view of `flat`."""
    return flat.view([shape[d] for d in order]).permute([order.index(d) for d in range(len(order))])


def pieces(count: int) -> Iterator[slice]:
    """Slices that cover `count` elements and stay in the cache; all but the last a multiple of 8 long."""
    return (slice(start, min(start + _PIECE, count)) for start in range(0, count, _PIECE))


def pack_bits(mask: Tensor) -> Tensor:
    """bool `(elements,)` as uint8 `(ceil(elements / 8),)`."""
    missing = -mask.numel() % 8
    if missing:
        mask = torch.cat((mask, mask.new_zeros(missing)))
    words = mask.view(torch.uint8).view(torch.int64)
    return ((words * _GATHER) >> 56).to(torch.uint8)


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """uint8 `(count,)`: not 0 where the mask was set."""
    return ((bits.to(torch.int64) * _SPREAD) & _EACH).view(torch.uint8)[:count]


def to_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 of the same shape and one float scale per row (the last dimension): `x` to within its row's peak / 254."""
    flat = x.reshape(-1, x.shape[-1])
    steps = torch.empty(flat.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((len(flat), 1), dtype=torch.float32, device=x.device)
    for piece in row_pieces(flat):
        peak = torch.mul(flat[piece].abs().amax(-1, keepdim=True).float(), 1 / 127, out=scale[piece])
        # in fp32 at least: bf16 would round 127 up to 128
        steps[piece] = torch.div(flat[piece], peak.clamp_min(torch.finfo(torch.float32).tiny)).round_()
    return steps.view(x.shape), scale.view(*x.shape[:-1], 1)


def row_pieces(flat: Tensor) -> Iterator[slice]:
    """Slices of the rows of a matrix that stay in the cache."""
    step = max(1, _PIECE // max(1, flat.shape[1]))
    return (slice(start, min(start + step, len(flat))) for start in range(0, len(flat), step))


def from_rows(steps: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `to_rows` packed."""
    return steps.to(dtype).mul_(scale.to(dtype))


def new_seed() -> int:
    """Drawn from the global generator of the CPU: a make_generator or resumed run draws the same ones."""
    return int(torch.randint(2**63 - 1, ()))


def make_generator(seed: int, device: torch.device) -> torch.Generator:
    """A new generator; the global one is not touched."""
    return torch.Generator(device).manual_seed(seed)


def kept_share(p: float) -> float:
    """The share that dropout of probability `p` keeps: `1 - p` to the next 65536th."""
    return 1 - round(p * _LANE) / _LANE


def dropout_noise(count: int, p: float, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """`(count,)`: 0 with probability `p` (to the next 65536th), else what keeps the mean.

    Four elements share one random word, which is several times faster than PyTorch's own draw on a CPU.
    """
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    keeps = words.view(torch.int16)[:count] >= round(p * _LANE) - _LANE // 2
    return keeps.to(dtype).mul_(1 / max(kept_share(p), 1 / _LANE))


def wide_enough(x: Tensor) -> Tensor:
    """fp16 and bf16 as fp32; others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off."""
    return torch.autocast(device.type, enabled=False)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts to on this tensor's device; None where it is off."""
    on = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if on and x.dtype != torch.float64 else None
