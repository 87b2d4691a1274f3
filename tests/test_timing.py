"""The time of a step from its pieces. How long they take is for `make bench-sparse`."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.sparse.auto.account import CostModel
from edgetune.sparse.auto.timing import QUARTER, Times
from edgetune.sparse.scheme import Slice
from edgetune.sparse.update import SparseUpdate

torch.set_num_threads(1)
TIMES = Times(
    frozen=(1.0, 2.0, 3.0), forward=(10.0, 20.0, 30.0), backward=(100.0, 200.0, 300.0),
    parts={"a": {"bias": 4.0, QUARTER: 6.0, "full": 12.0}, "b": {QUARTER: 9.0, "full": 3.0}}, update_ms=(0.5, 0.001),
)  # fmt: skip


@pytest.mark.parametrize(("start", "ms"), [(0, 60 + 500), (1, 1 + 50 + 300), (2, 3 + 30), (3, 6)])
def test_a_gradient_passes_what_comes_after_where_it_starts(start: int, ms: float) -> None:
    assert TIMES.base(start) == ms


def test_a_part_takes_what_was_measured_and_its_update() -> None:
    assert TIMES.part("a", "frozen", 0.0, 0.25, []) == 0
    assert TIMES.part("a", "bias", 0.0, 0.25, [100]) == pytest.approx(4 + 0.5 + 0.1)
    assert TIMES.part("a", "full", 1.0, 0.25, [1000, 10]) == pytest.approx(12 + 1 + 1.01)
    assert TIMES.part("unknown", "full", 1.0, 1.0, [1]) == pytest.approx(0.501)


@pytest.mark.parametrize(("ratio", "ms"), [(0.25, 6.0), (0.5, 8.0), (0.125, 5.0)])
def test_slices_lie_on_a_line(ratio: float, ms: float) -> None:
    assert TIMES.part("a", Slice(ratio=ratio), ratio, 0.25, [0]) == pytest.approx(ms + 0.5)


def test_no_slice_is_predicted_to_be_cheaper_than_a_smaller_one() -> None:
    """Where the whole weight was faster than a quarter, as copies of channels can make it."""
    assert TIMES.part("b", Slice(ratio=0.5), 0.5, 0.25, [0]) == TIMES.part("b", QUARTER, 0.25, 0.25, [0])


class Padded(nn.Conv2d):
    """Pads by a module of its own, as EfficientNet-Lite0 does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)
        self.pad = nn.ZeroPad2d(1)

    def forward(self, input: Tensor) -> Tensor:
        return functional.conv2d(self.pad(input), self.weight, self.bias)


def test_every_layer_is_timed_in_every_part_and_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        Padded(3, 8), nn.BatchNorm2d(8), nn.ReLU(), Padded(8, 16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 4)
    )
    before = copy.deepcopy(model.state_dict())
    profile = CostModel.of(
        model,
        (torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])),
        functional.cross_entropy,
        SparseUpdate().under(model),
    )
    times = profile.times
    assert len(times.frozen) == len(times.forward) == len(times.backward) == len(profile.live)
    assert set(times.parts) == {layer.name for layer in profile.layers} == {"0", "1", "3", "6"}
    assert {"bias", QUARTER, "full"} <= set(times.parts["3"])
    assert QUARTER not in times.parts["1"]
    every = [
        *times.frozen,
        *times.forward,
        *times.backward,
        *(ms for own in times.parts.values() for ms in own.values()),
    ]
    assert all(math.isfinite(ms) and ms >= 0 for ms in every)
    assert sum(times.backward) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
