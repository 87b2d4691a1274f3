"""Find the scheme with the largest sum of contributions within a budget of memory and optionally of step time.

What a passing gradient saves depends on where it starts; for a given start, memory adds up over groups of layers that
share an input. So the search allocates over the groups for every start.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgetune.core.allocate import MOST_POINTS, Front, Option
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.numbers import MIB
from edgetune.sparse.auto.account import CostModel, LayerCost, OptimizerSpec
from edgetune.sparse.auto.trace import StorageName
from edgetune.sparse.scheme import Part

Values = Mapping[str, Mapping[Part, float]]  # of each layer's parts; "frozen", worth nothing, need not be there
Of = tuple[str, Part]  # a layer, and what trains in it
Parts = tuple[Option[Of], ...]  # one choice for each layer of a group


@dataclass(frozen=True)
class Limits:
    """Upper limits of a scheme's costs."""

    bytes: float  # as `Account.total_bytes`
    step_ms: float | None = None

    def remaining(self, taken: float, ms: float) -> dict[str, float]:
        """What remains of the limits, by kind of cost."""
        return {"bytes": self.bytes - taken} | ({} if self.step_ms is None else {"ms": self.step_ms - ms})


@dataclass(frozen=True)
class Solution:
    """The best scheme of a search."""

    parts: Mapping[str, Part]
    value: float
    bytes: int
    step_ms: float


@dataclass(frozen=True)
class _Trained:
    """One part of one layer: its worth, and its costs besides those of a passing gradient."""

    part: Part
    value: float
    bytes: int  # gradient, optimizer state, copies; without the gradient where updates are made inside backward
    largest: int  # bytes of its largest gradient
    ms: float
    saved: Mapping[StorageName, int]
    saved_if_first: Mapping[StorageName, int]  # when no gradient passes


class _Problem:
    """The layers in the order they run, with what may train in each."""

    def __init__(
        self, costs: CostModel, values: Values, fixed: Mapping[str, Part], limits: Limits, optimizer: OptimizerSpec
    ) -> None:
        self.costs, self.fixed, self.limits, self.optimizer = costs, fixed, limits, optimizer
        names = {layer.name for layer in costs.layers}
        if unknown := [name for name in (*values, *fixed) if name not in names]:
            raise EdgetuneError("the cost model has no such layer", got=unknown[0], allowed=sorted(names))
        self.layers = [layer for layer in costs.layers if layer.name in values or layer.name in fixed]
        self.options = {layer.name: list(self._options(layer, values)) for layer in self.layers}
        bound = [layer.start for layer in self.layers if fixed.get(layer.name, "frozen") != "frozen"]
        latest = min(bound, default=None)  # a gradient has to start here at the latest
        self.starts = sorted({layer.start for layer in self.layers if latest is None or layer.start <= latest})
        self._passing: dict[int, dict[StorageName, int]] = {}
        self._extra: dict[tuple[int, str, Part], dict[StorageName, int]] = {}

    def _options(self, layer: LayerCost, values: Values) -> Iterator[_Trained]:
        if layer.name in self.fixed:
            parts: dict[Part, float] = {self.fixed[layer.name]: 0.0}
        else:
            parts = {"frozen": 0.0, **values[layer.name], **{"frozen": 0.0}}
        for part, value in parts.items():
            sizes = [size * layer.element_bytes for size in layer.sizes(part)]
            if not sizes and part != "frozen" and layer.name not in self.fixed:
                continue  # as the bias of a layer without one
            own = layer.state_bytes(part, self.optimizer) + layer.copied_bytes(part)
            own += 0 if self.optimizer.in_backward else sum(sizes)
            saved = {save.storage: save.nbytes for save in layer.saved(part)}
            if_first = {save.storage: save.nbytes for save in layer.saved(part, gradient_passes=False)}
            yield _Trained(part, value, own, max(sizes, default=0), self.costs.part_ms(layer, part), saved, if_first)

    def saved_if_gradient_passes(self, start: int) -> dict[StorageName, int]:
        """Bytes of the storages saved only because a gradient that starts here passes."""
        if start not in self._passing:
            saves = self.costs.saved_if_gradient_passes(start)
            self._passing[start] = {save.storage: save.nbytes for save in saves}
        return self._passing[start]

    def base(self, start: int) -> tuple[int, float]:
        """Bytes and milliseconds of a gradient that starts here, before anything trains."""
        saved_bytes = sum(self.saved_if_gradient_passes(start).values())
        return self.costs.weights_bytes + saved_bytes, self.costs.times.base(start)

    def extra(self, layer: LayerCost, option: _Trained, start: int) -> dict[StorageName, int]:
        """What an option saves beyond what a passing gradient saves."""
        key = (start, layer.name, option.part)
        if key not in self._extra:
            passing = self.saved_if_gradient_passes(start)
            saved = option.saved if layer.start > start else option.saved_if_first
            self._extra[key] = {
                name: size
                for name, size in saved.items()
                if name not in passing and not (name[-1] == layer.name and name[:-1] in passing)
            }
        return self._extra[key]

    def solution(self, parts: Mapping[str, Part], value: float) -> Solution:
        """A choice with the costs that the cost model gives for it."""
        chosen = {layer.name: parts[layer.name] for layer in self.layers if parts.get(layer.name, "frozen") != "frozen"}
        taken = self.costs.account(chosen, self.optimizer).total_bytes
        return Solution(chosen, value, taken, self.costs.step_ms(chosen))

    def infeasible_error(self) -> EdgetuneError:
        """The error that names the lowest reachable costs."""
        training: list[Mapping[str, Part]] = [
            {n: o.part} for n, options in self.options.items() for o in options if o.part != "frozen"
        ]
        if any(part != "frozen" for part in self.fixed.values()):
            training = [self.fixed]
        if not training:
            return EdgetuneError("no layer can train", exit_code=Exit.BUDGET)
        costs = [self.solution(parts, 0.0) for parts in training]
        least, limit = min(cost.bytes for cost in costs) / MIB, self.limits.step_ms
        fastest = min(cost.step_ms for cost in costs)
        wanted = f"{self.limits.bytes / MIB:.1f} MiB" + ("" if limit is None else f" and {limit:g} ms a step")
        has = f"{least:.1f} MiB" + ("" if limit is None else f", and the fastest step {fastest:.0f} ms")
        raised = f"raise budget_mib to {math.ceil(10 * least) / 10:.1f} or more, or make batches smaller"
        return EdgetuneError(
            f"no scheme fits {wanted}; the lowest possible is {has}",
            action=raised + ("" if limit is None else f", or raise step_ms to {math.ceil(fastest)}"),
            exit_code=Exit.BUDGET,
        )


def find_scheme(
    costs: CostModel,
    values: Values,
    limits: Limits,
    *,
    fixed: Mapping[str, Part] | None = None,
    optimizer: OptimizerSpec | None = None,
    most_points: int = MOST_POINTS,
) -> Solution:
    """The best scheme; of equally good ones the cheapest.

    `fixed`: parts that are decided. Exact as long as no more than `most_points` combinations of memory (and time)
    matter; see `edgetune.core.allocate`.

    Raises:
        EdgetuneError: (exit code 4) no scheme fits; it names the lowest reachable costs.
    """
    problem = _Problem(costs, values, fixed or {}, limits, optimizer or OptimizerSpec())
    best: tuple[float, float, dict[str, Part]] | None = None
    for cap in _caps(problem):
        table = _Table(problem, cap, most_points)
        for start in problem.starts:
            scheme = table.best(start)
            if scheme and any(p != "frozen" for p in scheme[2].values()) and (best is None or scheme[:2] > best[:2]):
                best = scheme
    if best is None:
        raise problem.infeasible_error()
    return problem.solution(best[2], best[0])


def _caps(problem: _Problem) -> list[int | None]:
    """With the update inside backward only the largest gradient counts: every size that it could have."""
    if not problem.optimizer.in_backward:
        return [None]
    sizes = {option.largest for options in problem.options.values() for option in options}
    floor = max((problem.options[name][0].largest for name in problem.fixed), default=0)
    return [*sorted(size for size in sizes if size >= floor)]


class _Table:
    """Fronts over the last groups, computed from the end; each start adds the few groups that it cuts."""

    def __init__(self, problem: _Problem, cap: int | None, most_points: int) -> None:
        self.problem, self.cap = problem, cap
        self.groups = sorted(_groups(problem), key=lambda group: max(layer.start for layer in group))
        early = min((layer.start for layer in problem.layers), default=0) - 1
        free = set(problem.saved_if_gradient_passes(early))
        self.free = [
            {n for one in g for o in problem.options[one.name] for saved in o.saved for n in (saved, saved[:-1])} & free
            for g in self.groups
        ]
        most = problem.limits.remaining(problem.costs.weights_bytes, 0.0)
        self.fronts: list[Front[Parts]] = [Front(most, most_points)]
        for group in reversed(self.groups):
            self.fronts.append(self.fronts[-1].plus(self.choices(group, early)))
        self.fronts.reverse()  # fronts[n]: over groups n and later

    def best(self, start: int) -> tuple[float, float, dict[str, Part]] | None:
        """Value, bytes (negative) and parts of the best choice in which no layer before `start` trains."""
        taken, ms = self.problem.base(start)
        taken += self.cap or 0
        limits = self.problem.limits.remaining(taken, ms)
        if min(limits.values()) < 0:
            return None
        passing = self.problem.saved_if_gradient_passes(start)
        cut = [
            number
            for number, group in enumerate(self.groups)
            if min(layer.start for layer in group) <= start or any(name not in passing for name in self.free[number])
        ]
        uncut_from = max(cut, default=-1) + 1
        front = self.fronts[uncut_from]
        for group in reversed(self.groups[:uncut_from]):
            if left := [layer for layer in group if layer.start >= start]:
                front = front.plus(self.choices(left, start), limits)
        best = front.best(limits)
        if best is None:
            return None
        return best.value, -(best.costs["bytes"] + taken), dict(own.name for group in best.name for own in group.name)

    def choices(self, group: Sequence[LayerCost], start: int) -> list[Option[Parts]]:
        """Every combination of the group's parts that no other beats."""
        lists: list[list[tuple[_Trained, dict[StorageName, int]]]] = []
        for layer in group:
            options = [o for o in self.problem.options[layer.name] if self.cap is None or o.largest <= self.cap]
            lists.append([(option, self.problem.extra(layer, option, start)) for option in options])
        users: dict[StorageName, set[int]] = {}
        sizes: dict[StorageName, int] = {}
        for number, options_of in enumerate(lists):
            for _, saved in options_of:
                sizes |= saved
                for name in saved:
                    users.setdefault(name, set()).add(number)
        shared = [name for name, numbers in users.items() if len(numbers) > 1]
        anything = dict.fromkeys(self.problem.limits.remaining(0.0, 0.0), math.inf)
        choices: list[Option[Parts]] = []
        for paid in _subsets(shared):  # once what is shared is paid for, the layers add up
            front: Front[Of] = Front(anything, None)
            for layer, options_of in zip(group, lists, strict=True):
                front = front.plus([
                    Option(
                        (layer.name, o.part),
                        o.value,
                        {"bytes": o.bytes + sum(size for n, size in saved.items() if n not in paid), "ms": o.ms},
                    )
                    for o, saved in options_of
                    if all(n in paid for n in saved if n in shared)
                ])  # fmt: skip
            bytes_paid = sum(sizes[name] for name in paid)
            choices += [
                Option(point.name, point.value, {**point.costs, "bytes": point.costs["bytes"] + bytes_paid})
                for point in front.points()
            ]
        return [option for point in Front[Parts](anything, None).plus(choices).points() for option in point.name]


def _subsets(names: list[StorageName], most: int = 6) -> list[frozenset[StorageName]]:
    """All subsets; of many names only none and all, which never pays too little."""
    if len(names) > most:
        return [frozenset(), frozenset(names)]
    return [frozenset(c) for count in range(len(names) + 1) for c in itertools.combinations(names, count)]


def _groups(problem: _Problem) -> list[list[LayerCost]]:
    """Layers that have to be chosen together, because they may save the same storages."""
    owner: dict[StorageName, int] = {}
    member = list(range(len(problem.layers)))

    def root(number: int) -> int:
        while member[number] != number:
            number = member[number]
        return number

    for number, layer in enumerate(problem.layers):
        for option in problem.options[layer.name]:
            for name in {**option.saved, **option.saved_if_first}:
                member[root(number)] = root(owner.setdefault(name, number))
    groups: dict[int, list[LayerCost]] = {}
    for number, layer in enumerate(problem.layers):
        groups.setdefault(root(number), []).append(layer)
    return list(groups.values())
