"""Layers that compute more than their class says, or whose weight is read elsewhere: each stands for models in use."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

Shape = tuple[int, ...]

NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": old_weight_norm,
    "old spectral_norm": old_spectral_norm,
}


class Standardized(nn.Conv2d):
    """Weight standardization, as in timm's normalizer-free nets."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-3)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Same(nn.Conv2d):
    """TensorFlow's padding, worked out from the image, as in timm's EfficientNets."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(x, (0, 2, 0, 2))
        return functional.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Scaled(nn.Linear):
    """An equalized learning rate, as in StyleGAN."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * 0.5, self.bias)


def patched(width: int, outputs: int) -> nn.Module:
    """A forward put on one object, as monkey patches do."""
    layer = nn.Linear(width, outputs)
    layer.forward = types.MethodType(lambda self, x: functional.linear(x, self.weight, self.bias) * 2, layer)
    return layer


class ReadByParent(nn.Module):
    """timm's BEiT: the parent calls the functional with the weight of a layer that never runs."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.inner, self.offset = nn.Linear(width, outputs, bias=False), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.inner.weight, self.offset)


class Fused(nn.Module):
    """Two projections computed as one, with the weights laid together at each call."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, outputs), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = torch.cat([self.one.weight, self.two.weight]), torch.cat([self.one.bias, self.two.bias])
        return functional.linear(x, weight, bias)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


class ReadBack(nn.Module):
    """A layer that runs, and whose weight is used transposed as well: a tied autoencoder."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.encode = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.encode(x)) @ self.encode.weight


class TimeFirst(nn.Module):
    """An LSTM in torch's own layout, `(time, batch, width)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.transpose(0, 1))[0].transpose(0, 1)


class Masked(nn.Module):
    """Attention that does not see positions of a negative first channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x[..., 0] < 0
        hidden = hidden & (torch.arange(x.shape[1]) > 0)  # one is always seen
        return self.attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0]


def _normalized(shape: Shape, norm: str, outputs: int) -> nn.Module:
    return NORMS[norm](nn.Linear(shape[-1], outputs))


ODD_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "odd_padding": lambda s, mode, dilation: nn.Conv2d(
        s[0], 6, 3, padding=dilation, dilation=dilation, padding_mode=mode
    ),
    "odd_groups": lambda s, stride: nn.Conv2d(s[0], 2 * s[0], 3, stride, 1, groups=2 if s[0] % 2 == 0 else s[0]),
    "odd_same": lambda s, dilation: nn.Conv2d(s[0], 4, 3, padding="same", dilation=dilation),
    "odd_standardized": lambda s: Standardized(s[0], 6, 3, padding=1),
    "odd_own_padding": lambda s: Same(s[0], 6, 3),
    "odd_normalized_conv": lambda s, norm: NORMS[norm](nn.Conv2d(s[0], 6, 3, padding=1)),
    "odd_normalized": _normalized,
    "odd_scaled": lambda s, outputs: Scaled(s[-1], outputs),
    "odd_patched": lambda s, outputs: patched(s[-1], outputs),
    "odd_read_by_parent": lambda s, outputs: ReadByParent(s[-1], outputs),
    "odd_fused": lambda s, outputs: Fused(s[-1], outputs),
    "odd_tied": lambda s: Tied(s[-1]),
    "odd_read_back": lambda s, outputs: ReadBack(s[-1], outputs),
    "odd_time_first": lambda s: TimeFirst(s[-1]),
    "odd_masked": lambda s: Masked(s[-1]),
}


def draw_odd_layer(draw: st.DrawFn, shape: Shape) -> tuple[str, tuple[Any, ...]]:
    """A layer of this file for values of this shape, and its settings."""
    if len(shape) == 3:
        kinds = ["odd_padding", "odd_groups", "odd_same", "odd_standardized", "odd_own_padding", "odd_normalized_conv"]
    else:
        kinds = ["odd_normalized", "odd_scaled", "odd_patched", "odd_read_by_parent", "odd_fused", "odd_tied"]
        kinds += ["odd_read_back"] + (["odd_time_first"] + ["odd_masked"] * (shape[-1] % 2 == 0)) * (len(shape) == 2)
    kind = draw(st.sampled_from(kinds))
    settings = {
        "odd_padding": lambda: (draw(st.sampled_from(["reflect", "circular", "replicate"])), draw(st.integers(1, 2))),
        "odd_groups": lambda: (draw(st.integers(1, 2)),),
        "odd_same": lambda: (draw(st.integers(1, 2)),),
        "odd_normalized_conv": lambda: (draw(st.sampled_from(["weight_norm", "spectral_norm", "old weight_norm"])),),
        "odd_normalized": lambda: (draw(st.sampled_from(sorted(NORMS))), 32),
        "odd_tied": tuple, "odd_standardized": tuple, "odd_own_padding": tuple, "odd_time_first": tuple,
        "odd_masked": tuple,
    }.get(kind, lambda: (draw(st.sampled_from([8, 32])),))  # fmt: skip
    return kind, settings()
