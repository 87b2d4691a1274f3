"""Measure how long each part of a training step takes on this machine: each layer frozen, passed, and trained in part.

A few training steps are timed, in which every layer takes turns at being frozen, training its bias, a quarter of its
weight, or all of it. In forward the clock ticks at every module. In backward a hook on a tensor is called just before
the operator that made it runs backward, so what passes until the next such call belongs to the clock of that operator.
"""

from __future__ import annotations

import itertools
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from edgetune.core.inputs import Inputs, call, logits_of, tensors_in
from edgetune.core.modes import preserve_state
from edgetune.sparse.auto.trace import Clock, Loss
from edgetune.sparse.scheme import Part, Slice, Under
from edgetune.train import optimizer
from edgetune.train.settings import Train

QUARTER = Slice(ratio=0.25)
TIMED_PARTS: tuple[Part, ...] = ("frozen", "bias", QUARTER, "full")
_RUNS = 3  # of which the median counts, after one to warm up
Spans = tuple[list[float], list[float]]  # milliseconds at each clock of forward and of backward


@dataclass(frozen=True)
class Times:
    """Milliseconds of the pieces of a step."""

    frozen: tuple[float, ...]  # at each clock of a forward without a graph
    forward: tuple[float, ...]  # at each clock of a forward that a gradient will pass; the loss is in the last
    backward: tuple[float, ...]  # the way back of a gradient for which nothing trains
    parts: Mapping[str, Mapping[Part, float]]  # of each layer, on top of that: "bias", QUARTER, "full"
    update_ms: tuple[float, float] = (0.0, 0.0)  # of the optimizer: for each tensor, and for each of its values

    def base(self, start: int) -> float:
        """A gradient that starts at this clock, before anything trains."""
        return sum(self.frozen[:start]) + sum(self.forward[start:]) + sum(self.backward[start + 1 :])

    def part(self, name: str, part: Part, share: float, quarter: float, sizes: Sequence[int]) -> float:
        """What training `part` of a layer adds: `share` of its weight, in tensors of these sizes.

        Between and below the shares that were tried, of which the smaller was `quarter`, times lie on a line.
        """
        if not sizes:
            return 0.0
        timed = self.parts.get(name, {})
        update = self.update_ms[0] * len(sizes) + self.update_ms[1] * sum(sizes)
        if not isinstance(part, Slice):
            return update + timed.get(part, 0.0)
        low, high = timed.get(QUARTER, 0.0), timed.get("full", 0.0)
        slope = max(0.0, high - low) / (1 - quarter) if quarter < 1 else 0.0
        return update + max(low + (share - quarter) * slope, 0.0)


class _Steps(Clock):
    """When each clock began in forward, and when backward came to what was made in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.began = [time.perf_counter()]
        self.back: list[tuple[float, int]] = []
        self.hooked: dict[int, weakref.ref[Tensor]] = {}  # no tensor is held, as in an ordinary step

    def see(self, kind: str, call_number: int, value: object) -> None:
        """Once for each tick of the clock."""
        made = self.now if kind == "out" else self.now - 1
        for tensor in tensors_in(value):
            hooked = self.hooked.get(id(tensor))
            if tensor.requires_grad and tensor.grad_fn is not None and (hooked is None or hooked() is not tensor):
                self.hooked[id(tensor)] = weakref.ref(tensor)
                tensor.register_hook(self._comes_back_to(made))  # type: ignore[no-untyped-call]
        self.began.append(time.perf_counter())

    def _comes_back_to(self, made: int) -> Callable[[Tensor], None]:
        return lambda _: self.back.append((time.perf_counter(), made))


def time_steps(
    model: nn.Module, batch: tuple[Inputs, Tensor], loss: Loss, under: Under, order: Sequence[str],
    parts_of: Mapping[str, Sequence[Part]], clocks: Mapping[str, Iterable[int]],
) -> Times:  # fmt: skip
    """Time `model`, whose layers are given in the `order` in which they run.

    `parts_of`: the parts among TIMED_PARTS that each layer can train; the first layer of `order` that can train always
    does. `clocks`: those of each layer. The model is left as it was.
    """
    first, *_, last = 2 * [name for name in order if "full" in parts_of[name]]
    frozen, _ = _spans(model, batch, loss, under, {last: "full"})
    turns: list[tuple[Mapping[str, Part], Spans]] = []
    for turn in range(len(TIMED_PARTS)):
        wanted = {name: TIMED_PARTS[(number + turn) % len(TIMED_PARTS)] for number, name in enumerate(order)}
        parts = {name: part if part in parts_of[name] else "frozen" for name, part in wanted.items()} | {first: "full"}
        turns.append((parts, _spans(model, batch, loss, under, parts)))
    forward, backward = _medians([spans for _, spans in turns])
    extra: dict[str, dict[Part, float]] = {}
    for name in order:
        mine = list(clocks[name])
        own = {part: _medians([spans for parts, spans in turns if parts[name] == part])
               for part in dict.fromkeys(parts[name] for parts, _ in turns)}  # fmt: skip
        took = {part: sum(there[n] + back[n] for n in mine) for part, (there, back) in own.items()}
        if name == first:  # no gradient passes it
            least = sum(frozen[n] for n in mine)
            extra[name] = dict.fromkeys(parts_of[name], max(0.0, took["full"] - least))
            continue
        extra[name] = {part: max(0.0, ms - took["frozen"]) for part, ms in took.items()}
        for n in mine:
            forward[n], backward[n] = (way[n] for way in own["frozen"])
    return Times(tuple(frozen), tuple(forward), tuple(backward), extra, _update_ms())


def _medians(runs: Sequence[Spans]) -> Spans:
    forward, backward = (
        [statistics.median(each) for each in zip(*way, strict=True)] for way in zip(*runs, strict=True)
    )
    return forward, backward


def _spans(
    model: nn.Module, batch: tuple[Inputs, Tensor], loss: Loss, under: Under, parts: Mapping[str, Part]
) -> Spans:
    with under(parts):
        return _medians([_step(model, batch, loss) for _ in range(_RUNS + 1)][1:])


def _step(model: nn.Module, batch: tuple[Inputs, Tensor], loss: Loss) -> Spans:
    inputs, labels = batch
    trained = [p for p in model.parameters() if p.requires_grad]
    clock = _Steps(model)
    with preserve_state(model, training=True), torch.enable_grad():
        with clock.on(model):
            clock.began = [time.perf_counter()]
            value = loss(logits_of(call(model, inputs)), labels)
            clock.began.append(time.perf_counter())
        turned = time.perf_counter()
        torch.autograd.grad(value, trained, allow_unused=True)
        ended = time.perf_counter()
    forward = [1e3 * (after - before) for before, after in itertools.pairwise(clock.began)]
    backward = [0.0] * len(forward)
    events = [(turned, len(forward) - 1), *sorted(clock.back), (ended, -1)]
    for (before, made), (after, _) in itertools.pairwise(events):
        backward[made] += 1e3 * (after - before)
    return forward, backward


@cache
def _update_ms() -> tuple[float, float]:
    """Of AdamW, a parameter at a time: for each tensor, and for each value."""
    few, many = (_update_of(size) for size in (2**10, 2**20))
    return few, max(0.0, many - few) / 2**20


def _update_of(size: int) -> float:
    parameter = nn.Parameter(torch.zeros(size // 32, 32))
    adamw, taken = optimizer.build(Train(), [parameter]), []
    for _ in range(_RUNS + 1):
        parameter.grad = torch.zeros_like(parameter)
        begun = time.perf_counter()
        optimizer.step(adamw)
        taken.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(taken[1:])
