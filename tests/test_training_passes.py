"""The pieces that a training program is rewritten with, each against autograd; the order and the plan of its arena."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from edgetune.export.training import conv, passes
from edgetune.export.training.cuts import Span, choose_cuts
from edgetune.export.training.order import Unit, lifetimes_of, place_tensors, plan_arena, schedule_units

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("function", "backward"),
    [
        (F.gelu, passes.gelu_backward),
        (lambda x: F.gelu(x, approximate="tanh"), lambda g, x: passes.gelu_backward(g, x, "tanh")),
        (F.silu, passes.silu_backward),
        (F.hardswish, passes.hardswish_backward),
        (F.hardsigmoid, passes.hardsigmoid_backward),
        (F.relu6, lambda g, x: passes.hardtanh_backward(g, x, 0.0, 6.0)),
        (F.relu, lambda g, x: passes.threshold_backward(g, F.relu(x), 0.0)),
        (lambda x: x.softmax(-1), lambda g, x: passes.softmax_backward(g, x.softmax(-1), -1, x.dtype)),
    ],
)
def test_backward_of_an_activation_is_autograds(
    function: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(4, 50) * 4, torch.zeros(4, 2), torch.full((4, 2), -30.0), torch.full((4, 2), 30.0)], 1)
    x.requires_grad_(True)
    gradient = torch.randn_like(x)
    (expected,) = torch.autograd.grad(function(x), x, gradient)
    assert torch.allclose(backward(gradient, x.detach()), expected, atol=1e-5, rtol=1e-5)


CONVOLUTIONS = [
    (channels, kernel, stride, padding, dilation)
    for channels, kernel, stride, padding, dilation in itertools.product(
        [(6, 8, 1), (6, 6, 6), (6, 9, 3)], [[1, 1], [3, 3], [5, 3]], [[1, 1], [2, 2], [2, 1]], [[0, 0], [1, 2]],
        [[1, 1], [2, 1]],
    )
    if all(d * (k - 1) >= p for d, k, p in zip(dilation, kernel, padding, strict=True))
]  # fmt: skip


@pytest.mark.parametrize(("channels", "kernel", "stride", "padding", "dilation"), CONVOLUTIONS)
def test_a_convolution_of_windows_is_pytorchs(
    channels: Any, kernel: Any, stride: Any, padding: Any, dilation: Any
) -> None:
    torch.manual_seed(0)
    inputs, outputs, groups = channels
    x = torch.randn(2, inputs, 9, 12, requires_grad=True)
    weight = torch.randn(outputs, inputs // groups, *kernel, requires_grad=True)
    y = torch.conv2d(x, weight, None, stride, padding, dilation, groups)
    settings = (stride, padding, dilation, groups)
    assert torch.allclose(conv.convolve(x, weight, *settings), y, atol=1e-4)
    gradient = torch.randn_like(y)
    for_x, for_weight = torch.autograd.grad(y, (x, weight), gradient)
    size = [9, 12]
    assert torch.allclose(conv.input_gradient(gradient, weight, size, *settings), for_x, atol=1e-4)
    assert torch.allclose(conv.weight_gradient(gradient, x, list(weight.shape), *settings), for_weight, atol=1e-4)
    wide = conv.dilate(gradient, size, kernel, stride, padding, dilation)
    turned = conv.flip_weight(weight, groups)
    assert torch.allclose(torch.conv2d(wide, turned, None, 1, 0, dilation, groups), for_x, atol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [([2, 2], [2, 2], [0, 0]), ([3, 3], [2, 2], [1, 1]), ([3, 2], [1, 2], [1, 0])]
)
def test_max_pooling_gives_the_first_largest_its_gradient(kernel: Any, stride: Any, padding: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 12).round().requires_grad_(True)  # many ties
    y = F.max_pool2d(x, kernel, stride, padding)
    gradient = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, gradient)
    got = conv.max_pool_gradient(gradient, x.detach(), kernel, stride, padding, [1, 1])
    assert torch.allclose(got, expected, atol=1e-5)


def chain(seed: int, count: int) -> tuple[list[Unit], dict[Any, int]]:
    """A random program: every step reads one to three earlier tensors and writes one."""
    chosen = random.Random(seed)
    units: list[Unit] = []
    for place in range(count):
        sources = chosen.sample(units, min(len(units), chosen.randint(1, 3)))
        reads = {key for source in sources for key in source.writes}
        units.append(Unit(place, dict.fromkeys(reads), {f"t{place}": None}, dict.fromkeys(sources)))
    return units, {f"t{n}": chosen.randint(1, 400) for n in range(count)}


@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_never_worse_and_never_runs_ahead(seed: int) -> None:
    units, sizes = chain(seed, 60)
    order = schedule_units(units, sizes, set())
    assert sorted(u.place for u in order) == list(range(60))
    done: set[Unit] = set()
    for unit in order:
        assert set(unit.before) <= done
        done.add(unit)
    assert plan_arena(order, sizes, set())[0] <= plan_arena(units, sizes, set())[0]


@pytest.mark.parametrize("seed", range(5))
def test_tensors_that_live_together_never_lie_together(seed: int) -> None:
    units, sizes = chain(seed, 40)
    spans = lifetimes_of(units, {"t3"})
    assert spans["t3"][1] == 40
    tensors = {key: (sizes[key], *span) for key, span in spans.items()}
    total, offsets = place_tensors(tensors)
    for a, b in itertools.combinations(tensors, 2):
        together = tensors[a][1] <= tensors[b][2] and tensors[b][1] <= tensors[a][2]
        apart = offsets[a] + tensors[a][0] <= offsets[b] or offsets[b] + tensors[b][0] <= offsets[a]
        assert not together or apart
    assert total == max(offsets[k] + -(-tensors[k][0] // 16) * 16 for k in tensors)
    alive = max(sum(s for s, a, b in tensors.values() if a <= t <= b) for t in range(40))
    assert alive <= total < 1.5 * alive + 16 * 40


def held_at_most(spans: list[Span], ends: list[int]) -> int:
    """The most that a stretch holds: what it reads and gives, and what goes past it."""
    most = 0
    for start, end in itertools.pairwise([0, *ends]):
        alive = [s for s in spans if s.first < end and s.last >= start]
        most = max(most, sum(s.size_bytes for s in alive if not (s.inside and start <= s.first and s.last < end)))
    return most


def backward_spans() -> tuple[list[Span], int]:
    """Eight layers forth and back: activations are kept for the way back, each gradient is used at once."""
    kept = [Span(100, n, 15 - n, True) for n in range(8)]
    gradients = [Span(300, 8 + n, 9 + n, True) for n in range(7)]
    return [*kept, *gradients], 16


def test_cuts_hold_no_more_than_any_others() -> None:
    spans, count = backward_spans()
    ends = choose_cuts(spans, count, [True] * (count + 1))
    assert ends[-1] == count
    tried = [[*chosen, count] for k in range(4) for chosen in itertools.combinations(range(1, count), k)]
    assert held_at_most(spans, ends) <= min(held_at_most(spans, other) for other in tried)


def test_operators_that_stay_together_are_not_cut_apart() -> None:
    spans, count = backward_spans()
    allowed = [place not in range(3, 14) for place in range(count + 1)]
    assert not set(choose_cuts(spans, count, allowed)) & set(range(3, 14))
