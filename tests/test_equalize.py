"""equalize: which channels between convolutions are scaled, by how much, and what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edgetune as et
from edgetune.capture.recorded import record
from edgetune.core.errors import EdgetuneError
from edgetune.core.technique import Sample
from edgetune.quant.channels import ChannelGroup, find_groups
from edgetune.quant.equalize import Equalize, measure_peaks
from support.laws import cnn, logits, pictures


def groups_of(model: nn.Module, inputs: Tensor) -> dict[str, ChannelGroup]:
    groups = find_groups(model, record(model, inputs), convolutions=True)
    return {group.producer.layer: group for group in groups}


class Chain(nn.Module):
    """An inverted bottleneck with a gate, grouped convolutions behind pooling, and a head that reads them flattened."""

    def __init__(self, clamp: nn.Module) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depth, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project = nn.Conv2d(8, 6, 1)
        self.split = nn.Conv2d(6, 4, 3, groups=2)
        self.hidden, self.norm3, self.head = nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.clamp = clamp
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.1, 2.0)
                nn.init.uniform_(module.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.clamp(self.norm2(self.depth(self.clamp(self.norm1(self.expand(x))))))
        x = x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        x = F.relu(self.split(F.max_pool2d(F.pad(self.project(x), (1, 1, 1, 1)), 2, 1, 1)))
        x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.head(F.relu(self.norm3(self.hidden(x))))


def chain(clamp: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return Chain(clamp or nn.ReLU()).eval()


def images(rows: int = 4) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_groups_pass_depthwise_and_grouped_layers_gates_pools_and_batch_norms() -> None:
    groups = groups_of(chain(), images())
    assert {name: list(group.readers) for name, group in groups.items()} == {
        "norm1": ["depth"], "norm2": ["down", "project"], "down": ["up"], "project": ["split"], "split": ["hidden"],
        "norm3": ["head"],
    }  # fmt: skip
    assert groups["split"].readers["hidden"].tolist() == [channel for channel in range(4) for _ in range(4)]
    assert groups["project"].readers["split"].tolist() == list(range(6))
    assert all(bool(group.free.all()) for group in groups.values())


def test_ranges_are_equal_on_both_sides_and_the_outputs_stay() -> None:
    model = chain()
    expected = model(images(64))
    Equalize().apply(model, Sample.of(images()))
    assert torch.allclose(model(images(64)), expected, atol=1e-6)

    def rows(norm: nn.Module, layer: nn.Module) -> Tensor:
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
        return layer.weight.abs().flatten(1).amax(1) * gain.abs()  # type: ignore[operator]

    depth = rows(model.norm2, model.depth)
    assert torch.allclose(rows(model.norm1, model.expand), depth, rtol=5e-3)
    read = torch.maximum(model.down.weight.abs().amax((0, 2, 3)), model.project.weight.abs().amax((0, 2, 3)))
    assert torch.allclose(depth, read, rtol=5e-3)
    split = model.split.weight.abs()
    assert torch.allclose(
        model.project.weight.abs().amax((1, 2, 3)),
        torch.cat([split[:2].amax((0, 2, 3)), split[2:].amax((0, 2, 3))]), rtol=5e-3,
    )  # fmt: skip


@pytest.mark.parametrize("clamp", [nn.ReLU6(), nn.Hardtanh(0.0, 6.0)])
def test_channels_that_reach_the_six_of_a_relu6_stay(clamp: nn.Module) -> None:
    model = chain(clamp)
    with torch.no_grad():
        model.norm1.bias[0], model.norm1.bias[1] = 3.1, 1.5
        model.norm1.weight[1] = 0.01
    before, expected = copy.deepcopy(model.norm1), model(images())
    Equalize().apply(model, Sample.of(images()))
    assert torch.allclose(model(images()), expected, atol=1e-6)
    assert model.norm1.weight[0] == before.weight[0]
    peaks = measure_peaks(model, ["norm1"], [images()])["norm1"]
    assert float(peaks[1]) == pytest.approx(3.0, rel=1e-3)  # more would even the ranges, and be cut off
    changed = model.norm1.weight != before.weight
    assert 3 <= int(changed.sum()) < 8


def test_a_residual_and_a_hard_swish_are_left_alone() -> None:
    model = cnn()
    groups = groups_of(model, pictures())  # type: ignore[arg-type]
    assert {name: list(group.readers) for name, group in groups.items()} == {
        f"blocks.{n}.norm1": [f"blocks.{n}.pointwise"] for n in range(3)
    }
    swish = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Hardswish(), nn.Conv2d(4, 2, 1))
    with pytest.raises(EdgetuneError, match="has no channels to scale"):
        Equalize().apply(swish, Sample.of(images()))


def test_int8_with_one_scale_per_weight_is_better_for_it() -> None:
    model = chain()
    with torch.no_grad():
        factors = torch.logspace(-2, 2, 8)
        for scaled in (model.norm2.weight, model.norm2.bias):
            scaled *= factors
        for layer in (model.down, model.project):  # the same function, with uneven weights
            layer.weight /= factors.view(1, -1, 1, 1)
    rows = images(64)
    expected, errors = logits(model, rows), []
    for steps in ([], [Equalize()]):
        quantized = et.apply(copy.deepcopy(model), [*steps, et.Int8(per_channel=False)], sample=Sample.of(rows))
        errors.append(float((logits(quantized, rows) - expected).square().mean() / expected.square().mean()))
    assert errors[1] < errors[0] / 100, errors
