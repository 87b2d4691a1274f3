"""Random small modules: lists of layers, each on one or two earlier values.

`plans()` draws a list such that shapes fit; `Drawn` is its module, with the same random weights each time. With
`unusual`, layers of odd_layers.py are among them, and several outputs. `python tests/support/random_techniques.py` puts
techniques on them, test_random_modules.py exports them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from support.nets import Call
from support.odd_layers import ODD_LAYERS, draw_odd_layer

CLASSES, WORDS, ROWS = 5, 20, 3

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "gelu": nn.GELU, "silu": nn.SiLU, "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU,
    "softplus": nn.Softplus, "mish": nn.Mish, "prelu": nn.PReLU, "softmax": lambda: nn.Softmax(-1),
    "gelu_tanh": lambda: nn.GELU("tanh"), "log_sigmoid": nn.LogSigmoid, "selu": nn.SELU, "softsign": nn.Softsign,
}  # fmt: skip


# Layers that torch has no module for


class SelfAttention(nn.Module):
    """One linear for query, key and value, then torch's attention, causal or not, with fewer key heads or not."""

    def __init__(self, width: int, heads: int, groups: int, causal: bool) -> None:
        super().__init__()
        self.head, self.heads, self.groups, self.causal = width // heads, heads, groups, causal
        self.query, self.both = nn.Linear(width, width), nn.Linear(width, 2 * groups * self.head)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        query = self.query(x).view(rows, length, self.heads, self.head).transpose(1, 2)
        key, value = self.both(x).view(rows, length, 2, self.groups, self.head).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(
            query, key, value, is_causal=self.causal, enable_gqa=self.groups != self.heads
        )
        return self.out(y.transpose(1, 2).reshape(rows, length, width))


class Multihead(nn.Module):
    """`nn.MultiheadAttention` with itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Excite(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * self.up(functional.relu(self.down(pooled))).sigmoid()


# Drawing


@dataclass(frozen=True)
class Step:
    """One layer: its name, the values it takes (by number; 0 is the input) and its settings."""

    kind: str
    sources: tuple[int, ...]
    given: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A module: the shape of one row of its input and its steps. `tokens`: the input is whole numbers."""

    shape: tuple[int, ...]
    tokens: bool
    steps: tuple[Step, ...]
    outputs: str = "one"  # or "tuple", "dict": the head's and the last layer's mean beside it


Shape = tuple[int, ...]


def image_layers(draw: st.DrawFn, shape: Shape) -> tuple[str, tuple[Any, ...]]:
    """A layer for `(channels, height, width)`."""
    channels, height, _ = shape
    kinds = ["conv", "depthwise", "pointwise", "batch_norm2d", "group_norm", "activation", "excite", "pool_all",
             "flatten", "to_sequence", "transpose_image", "pad", "upsample", "adaptive_pool", "channels_last_norm",
             "slice_channels", "deconv", "instance_norm", "repeat", "max_over_height"]  # fmt: skip
    kinds += ["max_pool", "avg_pool"] * (height >= 4) + ["shuffle", "gate"] * (channels % 2 == 0)
    kinds += ["pixel_shuffle"] * (channels % 4 == 0)
    kind = draw(st.sampled_from(kinds))
    given = {
        "conv": lambda: (draw(st.sampled_from([4, 6, 8])), draw(st.sampled_from([1, 3, 5])), draw(st.integers(1, 2)),
                         draw(st.booleans()), draw(st.integers(1, 2))),
        "depthwise": lambda: (draw(st.sampled_from([3, 5])), draw(st.integers(1, 2))),
        "pointwise": lambda: (draw(st.sampled_from([3, 4, 8])),),
        "group_norm": lambda: (draw(st.sampled_from([g for g in (1, 2, 3, 4) if channels % g == 0])),),
        "activation": lambda: (draw(st.sampled_from(sorted(ACTIVATIONS))),),
        "max_pool": lambda: (draw(st.sampled_from([2, 3])), draw(st.booleans())),
        "avg_pool": lambda: (draw(st.sampled_from([2, 3])), draw(st.booleans()), draw(st.booleans())),
        "upsample": lambda: (draw(st.sampled_from(["nearest", "bilinear"])), draw(st.booleans())),
        "pad": lambda: (draw(st.sampled_from(["constant", "reflect", "replicate"])),),
        "adaptive_pool": lambda: (draw(st.sampled_from([1, 2, 3])), draw(st.booleans())),
        "deconv": lambda: (draw(st.sampled_from([4, 6])), draw(st.sampled_from([2, 3, 4]))),
    }.get(kind, tuple)  # fmt: skip
    return kind, given()


def sequence_layers(draw: st.DrawFn, shape: Shape) -> tuple[str, tuple[Any, ...]]:
    """A layer for `(length, width)`."""
    length, width = shape
    kinds = ["linear", "layer_norm", "rms_norm", "activation", "conv1d", "transpose", "mean", "max", "first",
             "flatten", "multiply_self", "sum_kept", "standardize", "cumulative", "lstm"]  # fmt: skip
    kinds += ["attention", "multihead", "attention"] * (width % 2 == 0) + ["gate"] * (width % 2 == 0)
    kinds += ["to_image"] * (length % 2 == 0) + ["max_pool1d"] * (length >= 4)
    kind = draw(st.sampled_from(kinds))
    given = {
        "linear": lambda: (draw(st.sampled_from([4, 8, 12])), draw(st.booleans())),
        "layer_norm": lambda: (draw(st.booleans()),),
        "activation": lambda: (draw(st.sampled_from(sorted(ACTIVATIONS))),),
        "conv1d": lambda: (draw(st.sampled_from([4, 8])), draw(st.sampled_from([1, 3])), draw(st.integers(1, 2))),
        "attention": lambda: (draw(st.sampled_from([1, 2])), draw(st.booleans()), draw(st.booleans())),
        "multihead": lambda: (draw(st.sampled_from([1, 2])),),
        "mean": lambda: (draw(st.sampled_from([1, 2])),),
        "max": lambda: (draw(st.sampled_from([1, 2])),),
    }.get(kind, tuple)
    return kind, given()


def vector_layers(draw: st.DrawFn, shape: Shape) -> tuple[str, tuple[Any, ...]]:
    """A layer for `(width,)`."""
    kinds = ["linear", "layer_norm", "rms_norm", "activation", "batch_norm1d", "standardize", "multiply_self"]
    kinds += ["split_rows", "gate"] * (shape[0] % 2 == 0)
    kind = draw(st.sampled_from(kinds))
    given = {
        "linear": lambda: (draw(st.sampled_from([4, 8, 12])), draw(st.booleans())),
        "layer_norm": lambda: (draw(st.booleans()),),
        "activation": lambda: (draw(st.sampled_from(sorted(ACTIVATIONS))),),
    }.get(kind, tuple)
    return kind, given()


@st.composite
def plans(draw: st.DrawFn, unusual: bool = False) -> Plan:
    """A module of 2 to 6 layers over a picture, a sequence, a vector or tokens."""
    tokens = draw(st.integers(0, 3)) == 0
    shapes: list[Shape] = [(3, 8, 8), (4, 7, 9), (6, 8), (5, 12), (12,)]
    if unusual:  # widths that 4 bits in groups of 32 divide
        shapes = [(3, 8, 8), (4, 7, 9), (6, 32), (5, 64), (32,)]
    first: Shape = (draw(st.sampled_from([4, 6])),) if tokens else draw(st.sampled_from(shapes))
    steps: list[Step] = []
    values: list[Tensor] = [torch.zeros(2, *first, dtype=torch.long if tokens else torch.float32)]
    if tokens:
        steps.append(
            Step("embedding", (0,), (draw(st.sampled_from([32] if unusual else [8, 12])), draw(st.booleans())))
        )
        values.append(layer_of(steps[0], values)(*values).detach())
    for _ in range(draw(st.integers(2, 6))):
        start = 1 if tokens else 0
        source = draw(st.integers(max(start, len(values) - 2), len(values) - 1))
        odd = unusual and draw(st.integers(0, 2)) == 0
        step = _odd(draw, values, source) if odd else _next(draw, values, source, start)
        try:
            with torch.no_grad():
                made = layer_of(step, values).eval()(*(values[s] for s in step.sources))
        except (RuntimeError, ValueError):
            continue  # such as a window larger than the picture: torch itself has no such module
        steps.append(step)
        values.append(made)
    outputs = draw(st.sampled_from(["one", "one", "tuple", "dict"])) if unusual else "one"
    return Plan(first, tokens, tuple(steps), outputs)


def _odd(draw: st.DrawFn, values: list[Tensor], source: int) -> Step:
    kind, given = draw_odd_layer(draw, tuple(values[source].shape[1:]))
    return Step(kind, (source,), given)


def _next(draw: st.DrawFn, values: list[Tensor], source: int, start: int) -> Step:
    shape = tuple(values[source].shape[1:])
    same = [n for n in range(start, len(values)) if n != source and values[n].shape == values[source].shape]
    beside = [n for n in range(start, len(values)) if n != source and values[n].shape[2:] == values[source].shape[2:]
              and values[n].dim() == values[source].dim()]  # fmt: skip
    if same and draw(st.integers(0, 2)) == 0:
        return Step(draw(st.sampled_from(["add", "multiply", "maximum"])), (source, draw(st.sampled_from(same))))
    if beside and draw(st.integers(0, 2)) == 0:
        return Step("concatenate", (source, draw(st.sampled_from(beside))))
    draws = {3: image_layers, 2: sequence_layers, 1: vector_layers}[len(shape)]
    kind, given = draws(draw, shape)
    return Step(kind, (source,), given)


# Building


def layer_of(step: Step, values: list[Tensor]) -> nn.Module:
    """The module of a step, for values of these shapes."""
    shape = tuple(values[step.sources[0]].shape[1:])
    channels, width = shape[0], shape[-1]
    if step.kind in ODD_LAYERS:
        return ODD_LAYERS[step.kind](shape, *step.given)
    make = {**_common(step.given, width), **_pictures(step.given, channels), **_sequences(step.given, shape)}
    return make[step.kind]()


def _common(given: Any, width: int) -> dict[str, Callable[[], nn.Module]]:
    return {
        "embedding": lambda: nn.Embedding(WORDS, given[0], padding_idx=1 if given[1] else None),
        "add": lambda: Call(torch.add),
        "multiply": lambda: Call(torch.mul),
        "maximum": lambda: Call(torch.maximum),
        "concatenate": lambda: Call(lambda a, b: torch.cat([a, b], 1)),
        "activation": lambda: ACTIVATIONS[given[0]](),
        "linear": lambda: nn.Linear(width, given[0], bias=given[1]),
        "layer_norm": lambda: nn.LayerNorm(width, elementwise_affine=given[0]),
        "rms_norm": lambda: nn.RMSNorm(width),
        "gate": lambda: Call(lambda x: (lambda a, b: a * torch.sigmoid(b))(*x.chunk(2, 1 if x.dim() == 4 else -1))),
        "flatten": lambda: nn.Flatten(),
        "multiply_self": lambda: Call(lambda x: x * (x + 1) / 2),
        "standardize": lambda: Call(lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 0.1)),
    }


def _pictures(given: Any, channels: int) -> dict[str, Callable[[], nn.Module]]:
    return {
        "conv": lambda: nn.Conv2d(channels, given[0], given[1], given[2], given[1] // 2 * given[4], given[4],
                                  bias=given[3]),
        "depthwise": lambda: nn.Conv2d(channels, channels, given[0], given[1], given[0] // 2, groups=channels),
        "pointwise": lambda: nn.Conv2d(channels, given[0], 1),
        "deconv": lambda: nn.ConvTranspose2d(channels, given[0], given[1], 2),
        "batch_norm2d": lambda: nn.BatchNorm2d(channels),
        "instance_norm": lambda: nn.InstanceNorm2d(channels, affine=True),
        "group_norm": lambda: nn.GroupNorm(given[0], channels),
        "channels_last_norm": lambda: Call(lambda x: functional.layer_norm(x.permute(0, 2, 3, 1), (channels,))
                                           .permute(0, 3, 1, 2)),
        "excite": lambda: Excite(channels),
        "max_pool": lambda: nn.MaxPool2d(given[0], 2, given[0] // 2, ceil_mode=given[1]),
        "avg_pool": lambda: nn.AvgPool2d(given[0], 2, given[0] // 2, given[1], given[2]),
        "adaptive_pool": lambda: (nn.AdaptiveAvgPool2d if given[1] else nn.AdaptiveMaxPool2d)(given[0]),
        "pool_all": lambda: Call(lambda x: x.mean((2, 3))),
        "max_over_height": lambda: Call(lambda x: x.amax(2)),
        "repeat": lambda: Call(lambda x: x.repeat(1, 2, 1, 1)),
        "to_sequence": lambda: Call(lambda x: x.flatten(2).transpose(1, 2)),
        "transpose_image": lambda: Call(lambda x: x.transpose(2, 3).contiguous()),
        "pad": lambda: Call(lambda x: functional.pad(x, (1, 2, 0, 1), given[0])),
        "upsample": lambda: Call(lambda x: functional.interpolate(
            x, scale_factor=2, mode=given[0], align_corners=given[1] if given[0] == "bilinear" else None)),
        "shuffle": lambda: Call(lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)),
        "slice_channels": lambda: Call(lambda x: x[:, 1:, ::2]),
        "pixel_shuffle": lambda: nn.PixelShuffle(2),
    }  # fmt: skip


def _sequences(given: Any, shape: Shape) -> dict[str, Callable[[], nn.Module]]:
    length, width = shape[0], shape[-1]
    return {
        "conv1d": lambda: nn.Conv1d(length, given[0], given[1], given[2], given[1] // 2),
        "transpose": lambda: Call(lambda x: x.transpose(1, 2)),
        "mean": lambda: Call(lambda x: x.mean(given[0])),
        "max": lambda: Call(lambda x: x.amax(given[0])),
        "first": lambda: Call(lambda x: x[:, 0]),
        "sum_kept": lambda: Call(lambda x: x + x.sum(1, keepdim=True)),
        "cumulative": lambda: Call(lambda x: x.cumsum(1)),
        "max_pool1d": lambda: nn.MaxPool1d(2) if width >= 2 else nn.Identity(),
        "attention": lambda: SelfAttention(width, 2, given[0], given[1]),
        "multihead": lambda: Multihead(width, given[0]),
        "lstm": lambda: Lstm(width),
        "to_image": lambda: Call(lambda x: x.unflatten(1, (2, -1))),
        "batch_norm1d": lambda: nn.BatchNorm1d(width),
        "split_rows": lambda: Call(lambda x: x.unflatten(1, (2, -1))),
    }


class Lstm(nn.Module):
    """The states of an LSTM."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Drawn(nn.Module):
    """The module of a plan, with a linear over what the last layer gives."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plan, self.layers = plan, nn.ModuleList()
        values = [inputs_of(plan)]
        for step in plan.steps:
            layer = layer_of(step, values).eval()
            for norm in layer.modules():
                if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                    norm.running_mean.normal_(0, 0.3)
                    norm.running_var.uniform_(0.5, 2)
            with torch.no_grad():
                values.append(layer(*(values[s] for s in step.sources)))
            self.layers.append(layer)
        self.head = nn.Linear(values[-1][0].numel(), CLASSES)

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for step, layer in zip(self.plan.steps, self.layers, strict=True):
            values.append(layer(*(values[s] for s in step.sources)))
        logits, mean = self.head(values[-1].flatten(1)), values[-1].flatten(1).mean(1)
        return {"one": logits, "tuple": (logits, mean), "dict": {"logits": logits, "mean": mean}}[self.plan.outputs]


def inputs_of(plan: Plan) -> Tensor:
    """Some rows."""
    draw = torch.Generator().manual_seed(5)
    if plan.tokens:
        return torch.randint(0, WORDS, (ROWS, *plan.shape), generator=draw)
    return torch.randn(ROWS, *plan.shape, generator=draw)
