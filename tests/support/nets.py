"""Small standard networks that no library of the test environment has, with random weights; a function as a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Call(nn.Module):
    """A function of tensors as a layer."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(*values)


class ConvNorm(nn.Sequential):
    """Convolution, batch norm, relu6."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(),
        )


class Inverted(nn.Module):
    """MobileNetV2's block with LitePose's large depthwise kernel."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        hidden = 4 * inputs
        self.expand = ConvNorm(inputs, hidden, 1)
        self.depthwise = ConvNorm(hidden, hidden, 7, stride, groups=hidden)
        self.project = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.project(self.depthwise(self.expand(x))))
        return x + y if self.same else y


class FusionDeconvolution(nn.Module):
    """A transposed convolution of the deep features beside one of the shallow ones, summed, at twice the size."""

    def __init__(self, deep: int, shallow: int, outputs: int) -> None:
        super().__init__()
        self.deep = nn.ConvTranspose2d(deep, outputs, 4, 2, 1, bias=False)
        self.shallow = nn.ConvTranspose2d(shallow, outputs, 4, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, deep: Tensor, shallow: Tensor) -> Tensor:
        return functional.relu(self.norm(self.deep(deep) + self.shallow(shallow)))


class Pose(nn.Module):
    """LitePose-like: no high-resolution branch, fusion deconvolutions instead (Wang et al., 2022, arXiv:2205.01271).

    Returns one map per joint `(rows, joints, places)`: the prediction is the place of each joint.
    """

    def __init__(self, joints: int = 14) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(3, 16, stride=2), ConvNorm(16, 16, groups=16))
        self.stages = nn.ModuleList(
            nn.Sequential(Inverted(a, b, 2), Inverted(b, b)) for a, b in ((16, 16), (16, 32), (32, 48))
        )
        self.fusions = nn.ModuleList([FusionDeconvolution(48, 48, 24), FusionDeconvolution(24, 32, 24)])
        self.head = nn.Sequential(nn.Conv2d(24, 24, 5, padding=2, groups=24), nn.ReLU(), nn.Conv2d(24, joints, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        kept = []
        for stage in self.stages:
            x = stage(x)
            kept.append(x)
        for fusion, shallow in zip(self.fusions, reversed(kept), strict=False):
            x = fusion(x, shallow)
        return self.head(x).flatten(2)


class SamEncoder(nn.Module):
    """EfficientViT-SAM's image encoder: an EfficientViT-L backbone, its last stages brought to one size and summed
    (Zhang et al., 2024, arXiv:2402.05008). Returns `(rows, places, channels)`.
    """

    def __init__(self, backbone: nn.Module, widths: tuple[int, int, int], channels: int = 32) -> None:
        super().__init__()
        self.stem, self.stages = backbone.stem, backbone.stages
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, channels, 1, bias=False), nn.BatchNorm2d(channels)) for width in widths
        )
        self.middle = nn.Sequential(ConvNorm(channels, channels), ConvNorm(channels, channels))
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        kept = []
        for stage in self.stages:
            x = stage(x)
            kept.append(x)
        size = kept[-3].shape[-2:]
        laterals = [lateral(y) for lateral, y in zip(self.laterals, kept[-3:], strict=True)]
        total = laterals[0]
        for y in laterals[1:]:
            total = total + functional.interpolate(y, size=size, mode="bilinear", align_corners=False)
        return self.out(self.middle(total)).flatten(2).transpose(1, 2)


class ShortLongConvolution(nn.Module):
    """Causal depthwise convolutions, a short and a long one, gated (the first half of a CHELA layer)."""

    def __init__(self, width: int, short: int, long: int) -> None:
        super().__init__()
        self.short = nn.Conv1d(width, width, short, padding=short - 1, groups=width)
        self.long = nn.Conv1d(width, width, long, padding=long - 1, groups=width)
        self.gate = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        y = self.short(x.transpose(1, 2))[..., :length]
        y = self.long(functional.silu(y))[..., :length].transpose(1, 2)
        return y * functional.silu(self.gate(x))


class LinearAttention(nn.Module):
    """Causal attention without softmax in its parallel form: `(phi(q) phi(k)^T * mask) v`, normalized."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        split = self.qkv(x).view(rows, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = functional.elu(split[0]) + 1, functional.elu(split[1]) + 1, split[2]
        seen = torch.tril(torch.ones(length, length, dtype=x.dtype, device=x.device))
        scores = query @ key.transpose(-1, -2) * seen
        y = scores @ value / (scores.sum(-1, keepdim=True) + 1e-6)
        return self.out(self.norm(y.transpose(1, 2).reshape(rows, length, width)))


class ChelaBlock(nn.Module):
    """Short-long convolutions, then linear attention, then a gated feed-forward, each with a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.convolution = ShortLongConvolution(width, 4, 16)
        self.attention = LinearAttention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.convolution(self.norms[0](x))
        x = x + self.attention(self.norms[1](x))
        gate, value = self.up(self.norms[2](x)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * value)


class Chela(nn.Module):
    """A decoder with linear attention (CHELA-like: Liu et al., 2024, arXiv:2406.08128). Takes token numbers."""

    def __init__(self, vocabulary: int, width: int = 64, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(ChelaBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class VoiceDetector(nn.Module):
    """silero-vad-like: strided convolutions over a spectrum, an LSTM, the probability of speech in each window."""

    def __init__(self, bins: int = 40, width: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv1d(bins, width, 3, padding=1), nn.ReLU(),
            nn.Conv1d(width, width, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv1d(width, width, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.decoder = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, spectrum: Tensor) -> Tensor:
        x = self.encoder(spectrum).transpose(1, 2)
        states, _ = self.lstm(x)
        return self.decoder(states)


class First(nn.Module):
    """A model whose output is one entry of the dict that the inner one returns, with `axes` as its last form."""

    def __init__(self, model: nn.Module, entry: str, axes: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.inner, self.entry, self.axes = model, entry, axes

    def forward(self, *tensors: Tensor, **named: Tensor) -> Tensor:
        found: Tensor = self.inner(*tensors, **named)[self.entry]
        return found if self.axes is None else found.permute(self.axes)


class Clip(nn.Module):
    """Both of CLIP's vectors beside each other: the similarities mix the rows of a batch, these do not."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.clip = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        found = self.clip(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)
        return torch.cat([found.text_embeds, found.image_embeds], -1)


def shared_ffn(model: nn.Module) -> nn.Module:
    """A decoder whose layers all hold the first one's feed-forward (MobiLlama: Thawakar et al., 2024)."""
    layers = model.model.layers
    for layer in layers[1:]:
        layer.mlp = layers[0].mlp
    return model
