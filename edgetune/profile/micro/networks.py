"""Random networks of the blocks that models for small devices consist of, at the sizes of such models.

In a network an operator finds the caches as the operators before it left them. Each of its layers has sizes of its own,
drawn from the ranges of published networks, so that few programs show each kernel in many sizes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.profile.micro.program import INT4, INT8, Micro, floats, quantized_name

_ACTIVATIONS: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU)


def _conv(wide: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(wide, out, kernel, stride, kernel // 2, groups=groups)


class _Excite(nn.Module):
    """Squeeze and excitation (Hu et al. 2018)."""

    def __init__(self, wide: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = _conv(wide, inner), _conv(inner, wide)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(functional.relu(self.down(x.mean((2, 3), keepdim=True)))))


class _Inverted(nn.Module):
    """An inverted residual block (Sandler et al. 2018; Howard et al. 2019)."""

    def __init__(self, draw: random.Random, wide: int, out: int, stride: int) -> None:
        super().__init__()
        inner = _eights(wide * draw.choice((2, 3, 4, 6)))
        self.expand, self.project = _conv(wide, inner), _conv(inner, out)
        self.spatial = _conv(inner, inner, draw.choice((3, 3, 5, 7)), stride, inner)
        self.act = draw.choice(_ACTIVATIONS)()
        self.excite = (
            _Excite(inner, _eights(inner // draw.choice((4, 8, 16)))) if draw.random() < 0.5 else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.excite(self.act(self.spatial(self.act(self.expand(x))))))
        return y + x if y.shape == x.shape else y


class _Residual(nn.Module):
    """Two convolutions, or a bottleneck with groups, and a shortcut (He et al. 2016; Xie et al. 2017)."""

    def __init__(self, draw: random.Random, wide: int, out: int, stride: int) -> None:
        super().__init__()
        self.act = draw.choice((nn.ReLU, nn.SiLU))()
        if draw.random() < 0.5:
            layers = [_conv(wide, out, 3, stride), self.act, _conv(out, out, 3)]
        else:
            groups = draw.choice((1, 1, 2, 4))
            inner = _eights(out // draw.choice((1, 2, 4)), 8 * groups)
            layers = [_conv(wide, inner), self.act, _conv(inner, inner, 3, stride, groups), self.act, _conv(inner, out)]
        self.layers = nn.Sequential(*layers)
        self.shortcut = nn.Identity() if (wide, stride) == (out, 1) else _conv(wide, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.layers(x) + self.shortcut(x))
        return out


class _ConvNeXt(nn.Module):
    """A depthwise convolution, a norm and an MLP (Liu et al. 2022)."""

    def __init__(self, draw: random.Random, wide: int, out: int, stride: int) -> None:
        super().__init__()
        self.enter = _conv(wide, out, 2 if stride > 1 else 1, stride)
        self.enter.padding = (0, 0)
        self.spatial = _conv(out, out, draw.choice((5, 7)), 1, out)
        self.norm, inner = nn.LayerNorm(out), draw.choice((2, 3, 4)) * out
        self.up, self.down = nn.Linear(out, inner), nn.Linear(inner, out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        y = self.norm(self.spatial(x).permute(0, 2, 3, 1))
        out: Tensor = x + self.down(functional.gelu(self.up(y))).permute(0, 3, 1, 2)
        return out


class _Mixed(nn.Module):
    """Branches that are joined, split and shuffled (Szegedy et al. 2015; Zhang et al. 2018; Han et al. 2020)."""

    def __init__(self, draw: random.Random, wide: int, out: int, stride: int) -> None:
        super().__init__()
        half = _eights(out // 2)
        self.first, self.second = _conv(wide, half), _conv(half, half, draw.choice((3, 5)), stride, half)
        self.pool = draw.choice((nn.MaxPool2d, nn.AvgPool2d))(3, stride, 1)
        self.last = _conv(half + wide, out)
        self.act = draw.choice(_ACTIVATIONS)()
        self.shuffled = draw.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.second(self.act(self.first(x))))
        out: Tensor = self.last(torch.cat((y, self.pool(x)), 1))
        if not self.shuffled:
            return out
        wide = out.shape[1] // 2
        return torch.cat((out[:, wide:], out[:, :wide].sigmoid()), 1)


_BLOCKS: dict[str, Callable[[random.Random, int, int, int], nn.Module]] = {
    "inverted": _Inverted,
    "residual": _Residual,
    "convnext": _ConvNeXt,
    "mixed": _Mixed,
}


class _Images(nn.Module):
    """A stem, stages of blocks that halve the picture and widen it, and a classifier of the mean."""

    def __init__(self, kind: str, px: int, width: int, seed: int) -> None:
        super().__init__()
        draw = random.Random(f"{kind} {px} {width} {seed}")
        stride = draw.choice((2, 4)) if px >= 96 else draw.choice((1, 2))
        self.stem = _conv(3, width, draw.choice((3, 7) if stride == 4 else (3,)), stride)
        blocks: list[nn.Module] = []
        side, wide = -(-px // stride), width
        while side > (4 if px >= 96 else 2):
            out, side = _eights(wide * draw.uniform(*((1.4, 2.2) if px >= 96 else (1.1, 1.7)))), -(-side // 2)
            blocks.append(_BLOCKS[kind](draw, wide, out, 2))
            wide = out
            if draw.random() < 0.6:
                blocks.append(_BLOCKS[kind](draw, wide, wide, 1))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(wide, draw.choice((10, 100, 1000)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(functional.relu(self.stem(x))).mean((2, 3)))
        return out


class _Transformer(nn.Module):
    """Attention and an MLP, each after a norm or before it (Vaswani et al. 2017; Dosovitskiy et al. 2021)."""

    def __init__(self, draw: random.Random, wide: int, heads: int) -> None:
        super().__init__()
        self.heads, self.fused, self.gated = heads, draw.random() < 0.5, draw.random() < 0.3
        inner = _eights(wide * draw.choice((2, 3, 4)))
        self.qkv = nn.Linear(wide, 3 * wide) if self.fused else nn.ModuleList(nn.Linear(wide, wide) for _ in range(3))
        self.out, self.down = nn.Linear(wide, wide), nn.Linear(inner, wide)
        self.up = nn.Linear(wide, 2 * inner if self.gated else inner)
        self.first, self.second = nn.LayerNorm(wide), nn.LayerNorm(wide)

    def forward(self, x: Tensor) -> Tensor:
        rows, wide = x.shape[1:]
        y = self.first(x)
        if isinstance(self.qkv, nn.ModuleList):
            q, k, v = (layer(y).reshape(1, rows, self.heads, -1).transpose(1, 2) for layer in self.qkv)
        else:
            q, k, v = self.qkv(y).reshape(1, rows, 3, self.heads, wide // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, rows, wide))
        inner = self.up(self.second(x))
        if self.gated:
            gate, value = inner.chunk(2, -1)
            inner = functional.silu(gate) * value
        else:
            inner = functional.gelu(inner)
        out: Tensor = x + self.down(inner)
        return out


class _Tokens(nn.Module):
    """Transformer blocks that get narrower, on rows of values."""

    def __init__(self, rows: int, wide: int, seed: int) -> None:
        super().__init__()
        draw = random.Random(f"tokens {rows} {wide} {seed}")
        layers: list[nn.Module] = []
        for _ in range(3):
            heads = draw.choice([n for n in (2, 3, 4, 6, 8, 12) if wide % n == 0 and wide // n >= 16])
            layers.append(_Transformer(draw, wide, heads))
            narrow = max(64 * round(wide * draw.uniform(0.5, 0.9) / 64), 64)
            layers.append(nn.Linear(wide, narrow))
            wide = narrow
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(wide, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(x).mean(1))
        return out


def _eights(channels: float, step: int = 8) -> int:
    """The nearest multiple of `step`, at least one."""
    return max(step * round(channels / step), step)


_PICTURES = ((224, 16), (224, 32), (160, 48), (96, 24), (64, 8), (64, 16), (48, 12), (32, 16), (32, 24))
_ROWS = (
    (197, 192), (196, 384), (128, 384), (128, 768), (256, 320), (64, 256), (16, 512), (8, 192), (32, 128), (48, 64),
    (16, 64), (16, 96),
)  # fmt: skip


def networks() -> Iterator[Micro]:
    """Each network in floating point, and in 8 or 4 bits."""
    for number, (px, width) in enumerate(_PICTURES):
        for kind in _BLOCKS:
            for quantize in ("", INT8):
                name = quantized_name(f"{kind}-{width}x{px}", quantize)
                yield Micro(
                    name, partial(_Images, kind, px, width, number), floats((1, 3, px, px)), quantize, family=kind
                )
    for number, (rows, wide) in enumerate(_ROWS):
        for quantize in ("", INT4):
            name = quantized_name(f"tokens-{rows}x{wide}", quantize)
            yield Micro(name, partial(_Tokens, rows, wide, number), floats((1, rows, wide)), quantize, family="tokens")
