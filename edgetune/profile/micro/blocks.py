"""Small networks of typical blocks, whose errors when left out give a calibration its prediction interval.

An operator in a network finds other data in the caches than in a chain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.profile.micro.program import INT4, INT8, Micro, floats, quantized_name


class _Inverted(nn.Module):
    """An inverted residual block with squeeze-and-excitation (Sandler et al. 2018; Howard et al. 2019)."""

    def __init__(self, wide: int, kernel: int, excited: bool) -> None:
        super().__init__()
        inner = 4 * wide
        self.expand, self.project = nn.Conv2d(wide, inner, 1), nn.Conv2d(inner, wide, 1)
        self.spatial = nn.Conv2d(inner, inner, kernel, padding=kernel // 2, groups=inner)
        self.down = nn.Conv2d(inner, wide, 1) if excited else None
        self.up = nn.Conv2d(wide, inner, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu6(self.spatial(functional.relu6(self.expand(x))))
        if self.down is not None:
            y = y * torch.sigmoid(self.up(functional.relu(self.down(y.mean((2, 3), keepdim=True)))))
        out: Tensor = x + self.project(y)
        return out


class _Residual(nn.Module):
    """Two convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(wide, wide, 3, padding=1), nn.Conv2d(wide, wide, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = functional.relu(x + self.second(functional.relu(self.first(x))))
        return out


class _ConvNeXt(nn.Module):
    """A depthwise convolution, a norm and an MLP (Liu et al. 2022)."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(wide, wide, 5, padding=2, groups=wide)
        self.norm, self.up, self.down = nn.LayerNorm(wide), nn.Linear(wide, 4 * wide), nn.Linear(4 * wide, wide)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.spatial(x).permute(0, 2, 3, 1))
        out: Tensor = x + self.down(functional.gelu(self.up(y))).permute(0, 3, 1, 2)
        return out


class _Transformer(nn.Module):
    """Attention and an MLP, each after a norm (Vaswani et al. 2017)."""

    def __init__(self, wide: int, heads: int, gated: bool) -> None:
        super().__init__()
        self.heads, self.gated = heads, gated
        self.qkv, self.out = nn.Linear(wide, 3 * wide), nn.Linear(wide, wide)
        self.up, self.down = nn.Linear(wide, 8 * wide if gated else 4 * wide), nn.Linear(4 * wide, wide)
        self.first, self.second = nn.LayerNorm(wide), nn.LayerNorm(wide)

    def forward(self, x: Tensor) -> Tensor:
        rows, wide = x.shape[1:]
        split = (self.qkv(self.first(x)).reshape(1, rows, 3, self.heads, wide // self.heads)).permute(2, 0, 3, 1, 4)
        scores = torch.softmax(split[0] @ split[1].transpose(-1, -2) * (wide // self.heads) ** -0.5, -1)
        x = x + self.out((scores @ split[2]).transpose(1, 2).reshape(1, rows, wide))
        inner = self.up(self.second(x))
        if self.gated:
            gate, value = inner.chunk(2, -1)
            inner = functional.silu(gate) * value
        else:
            inner = functional.gelu(inner)
        out: Tensor = x + self.down(inner)
        return out


class _Network(nn.Module):
    """A stem, blocks, and a classifier of the mean."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], wide: int) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.Sequential(*blocks), nn.Linear(wide, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(self.stem(x))
        out: Tensor = self.head(y.mean((2, 3)) if y.dim() == 4 else y.mean(1))
        return out


def _image_network(block: str, wide: int, times: int) -> nn.Module:
    kinds: dict[str, Callable[[], nn.Module]] = {
        "inverted-3": lambda: _Inverted(wide, 3, excited=False),
        "inverted-5": lambda: _Inverted(wide, 5, excited=True),
        "residual": lambda: _Residual(wide),
        "convnext": lambda: _ConvNeXt(wide),
    }
    return _Network(nn.Conv2d(3, wide, 4, 4), [kinds[block]() for _ in range(times)], wide)


def _token_network(wide: int, heads: int, gated: bool, times: int) -> nn.Module:
    return _Network(nn.Linear(wide, wide), [_Transformer(wide, heads, gated) for _ in range(times)], wide)


def blocks() -> Iterator[Micro]:
    """Each network in floating point, and in 8 or 4 bits."""
    for block, wide, size, times in (
        ("inverted-3", 24, 96, 4), ("inverted-3", 64, 32, 6), ("inverted-5", 32, 64, 4), ("inverted-5", 96, 24, 6),
        ("residual", 32, 64, 3), ("residual", 192, 24, 6), ("convnext", 40, 64, 3), ("convnext", 128, 32, 4),
        ("inverted-3", 16, 48, 3), ("inverted-5", 48, 16, 5), ("residual", 64, 16, 4), ("convnext", 64, 16, 4),
    ):  # fmt: skip
        for quantize in ("", INT8):
            name = quantized_name(f"{block}-{wide}x{size}", quantize)
            network = partial(_image_network, block, wide, times)
            yield Micro(name, network, floats((1, 3, size, size)), quantize, network=True)
    for rows, wide, heads, gated, times in (
        (16, 64, 4, False, 4), (32, 128, 4, True, 3), (64, 256, 8, False, 2), (24, 384, 6, True, 3),
        (8, 96, 3, False, 6), (48, 192, 4, True, 2), (128, 64, 2, False, 3), (12, 160, 4, False, 5),
    ):  # fmt: skip
        for quantize in ("", INT4):
            name = quantized_name(f"transformer-{rows}x{wide}{'-gated' if gated else ''}", quantize)
            network = partial(_token_network, wide, heads, gated, times)
            yield Micro(name, network, floats((1, rows, wide)), quantize, network=True)
