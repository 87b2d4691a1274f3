"""The scheme with the largest sum of contributions under a budget of memory and, if wanted, of step time.

`exactly`: what passes the gradient depends on where it starts, and given the start, memory adds up over groups of
layers that share an input. So for every start, dynamic programming over the groups. `by_evolution` needs no such
structure and takes any cost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.sparse.auto.account import MIB, Layer, Profile, Updating
from edgetune.sparse.auto.trace import StorageName
from edgetune.sparse.scheme import Part

Values = Mapping[str, Mapping[Part, float]]  # of each layer's parts; "frozen", worth nothing, need not be there


@dataclass(frozen=True)
class Limits:
    """What a scheme may take."""

    bytes: float  # as `Account.total_bytes`
    step_ms: float | None = None


@dataclass(frozen=True)
class Found:
    """The best scheme of a search."""

    parts: Mapping[str, Part]
    value: float
    bytes: int
    step_ms: float


@dataclass(frozen=True)
class Option:
    """One part of one layer: its worth, and what it takes besides what passes it."""

    part: Part
    value: float
    bytes: int  # gradient, optimizer state, copies; without the gradient where updates are made inside backward
    largest: int  # bytes of its largest gradient
    ms: float
    kept: Mapping[StorageName, int]
    alone: Mapping[StorageName, int]  # where no gradient passes


class Task:
    """The layers in the order they run, with what may train in each."""

    def __init__(
        self, profile: Profile, values: Values, fixed: Mapping[str, Part], limits: Limits, updating: Updating
    ) -> None:
        self.profile, self.fixed, self.limits, self.updating = profile, fixed, limits, updating
        known = {layer.name for layer in profile.layers}
        if unknown := [name for name in (*values, *fixed) if name not in known]:
            raise EdgetuneError("the profile has no such layer", got=unknown[0], allowed=sorted(known))
        self.layers = [layer for layer in profile.layers if layer.name in values or layer.name in fixed]
        self.options = {layer.name: self._options(layer, values, fixed) for layer in self.layers}
        bound = [layer.start for layer in self.layers if fixed.get(layer.name, "frozen") != "frozen"]
        latest = min(bound, default=None)  # a gradient has to start here at the latest
        self.starts = sorted({layer.start for layer in self.layers if latest is None or layer.start <= latest})
        self._passing: dict[int, dict[StorageName, int]] = {}
        self._passing_bytes: dict[int, int] = {}
        self._extra: dict[tuple[int, str, Part], dict[StorageName, int]] = {}

    def _options(self, layer: Layer, values: Values, fixed: Mapping[str, Part]) -> list[Option]:
        if layer.name in fixed:
            parts: dict[Part, float] = {fixed[layer.name]: 0.0}
        else:
            parts = {"frozen": 0.0, **values[layer.name], **{"frozen": 0.0}}
        found = []
        for part, value in parts.items():
            sizes = [size * layer.element_bytes for size in layer.sizes(part)]
            if not sizes and part != "frozen" and layer.name not in fixed:
                continue  # as the bias of a layer without one
            own = layer.state_bytes(part, self.updating) + layer.copied_bytes(part)
            own += 0 if self.updating.in_backward else sum(sizes)
            kept = {save.storage: save.nbytes for save in layer.kept(part)}
            alone = {save.storage: save.nbytes for save in layer.kept(part, passed=False)}
            found.append(
                Option(part, value, own, max(sizes, default=0), self.profile.part_ms(layer, part), kept, alone)
            )
        return found

    def passing(self, start: int) -> dict[StorageName, int]:
        """What is kept only because a gradient that starts here passes."""
        if start not in self._passing:
            self._passing[start] = {save.storage: save.nbytes for save in self.profile.passing(start)}
            self._passing_bytes[start] = sum(self._passing[start].values())
        return self._passing[start]

    def base(self, start: int) -> tuple[int, float]:
        """Bytes and milliseconds of a gradient that starts here, before anything trains."""
        self.passing(start)
        return self.profile.weights_bytes + self._passing_bytes[start], self.profile.times.base(start)

    def extra(self, layer: Layer, option: Option, start: int) -> dict[StorageName, int]:
        """What an option keeps beyond what passes."""
        key = (start, layer.name, option.part)
        if key not in self._extra:
            passing = self.passing(start)
            kept = option.kept if layer.start > start else option.alone
            self._extra[key] = {
                name: size
                for name, size in kept.items()
                if name not in passing and not (name[-1] == layer.name and name[:-1] in passing)
            }
        return self._extra[key]

    def cost(self, chosen: Mapping[str, Option]) -> tuple[float, float, float]:
        """Bytes, milliseconds and value of options by layer."""
        by_name = self.by_name
        training = [(by_name[name], option) for name, option in chosen.items() if option.part != "frozen"]
        if not training:
            return float(self.profile.weights_bytes), sum(self.profile.times.frozen), 0.0
        start = min(layer.start for layer, _ in training)
        taken, ms = self.base(start)
        kept: dict[StorageName, int] = {}
        for layer, option in training:
            if extra := self.extra(layer, option, start):
                kept.update(extra)
            taken += option.bytes
            ms += option.ms
        taken += sum(kept.values())
        if self.updating.in_backward:
            taken += max(option.largest for _, option in training)
        return taken, ms, sum(option.value for _, option in training)

    @cached_property
    def by_name(self) -> dict[str, Layer]:
        """The layers by name."""
        return {layer.name: layer for layer in self.layers}

    def found(self, parts: Mapping[str, Part], value: float) -> Found:
        """A choice with what it takes, told by the profile itself."""
        chosen = {layer.name: parts[layer.name] for layer in self.layers if parts.get(layer.name, "frozen") != "frozen"}
        return Found(
            chosen, value, self.profile.account(chosen, self.updating).total_bytes, self.profile.step_ms(chosen)
        )

    def refuse(self) -> EdgetuneError:
        """The error that says what least can be had."""
        fixed = {name: options[0] for name, options in self.options.items() if name in self.fixed}
        if any(option.part != "frozen" for option in fixed.values()):
            costs = [self.cost(fixed)]
        else:
            costs = [self.cost({n: o}) for n, options in self.options.items() for o in options if o.part != "frozen"]
        if not costs:
            return EdgetuneError("no layer can train", exit_code=Exit.BUDGET)
        least, fastest, limit = min(c[0] for c in costs) / MIB, min(c[1] for c in costs), self.limits.step_ms
        wanted = f"{self.limits.bytes / MIB:.1f} MiB" + ("" if limit is None else f" and {limit:g} ms a step")
        has = f"{least:.1f} MiB" + ("" if limit is None else f", and the fastest step {fastest:.0f} ms")
        raised = f"raise budget_mib to {math.ceil(10 * least) / 10:.1f} or more, or make batches smaller"
        return EdgetuneError(
            f"no scheme fits {wanted}; the lowest possible is {has}",
            action=raised + ("" if limit is None else f", or raise step_ms to {math.ceil(fastest)}"),
            exit_code=Exit.BUDGET,
        )


def exactly(
    profile: Profile,
    values: Values,
    limits: Limits,
    *,
    fixed: Mapping[str, Part] | None = None,
    updating: Updating | None = None,
    most_points: int = 8192,
) -> Found:
    """The best scheme by dynamic programming; of equally good ones the one that takes least.

    `fixed`: parts that are decided. Exact as long as no more than `most_points` combinations of memory (and time)
    matter; beyond that, of those within a part in `most_points` of the budget only the best goes on.

    Raises:
        EdgetuneError: (exit code 4) no scheme fits; it says the least that can be had.
    """
    task = Task(profile, values, fixed or {}, limits, updating or Updating())
    best: tuple[float, float, dict[str, Part]] | None = None
    for cap in _caps(task):
        table = _Table(task, cap, most_points)
        for start in task.starts:
            found = table.best(start)
            if found and any(p != "frozen" for p in found[2].values()) and (best is None or found[:2] > best[:2]):
                best = found
    if best is None:
        raise task.refuse()
    return task.found(best[2], best[0])


def _caps(task: Task) -> list[int | None]:
    """With the update inside backward only the largest gradient counts: every size that it could have."""
    if not task.updating.in_backward:
        return [None]
    sizes = {option.largest for options in task.options.values() for option in options}
    floor = max((task.options[name][0].largest for name in task.fixed), default=0)
    return [*sorted(size for size in sizes if size >= floor)]


@dataclass(frozen=True)
class _Items:
    """The combinations of parts of one group worth looking at: bytes, milliseconds and value of each."""

    parts: list[dict[str, Part]]
    cost: np.ndarray  # (items, 3)


class _Table:
    """Fronts over the last groups, computed from the end; each start adds the few groups that it cuts."""

    def __init__(self, task: Task, cap: int | None, most_points: int) -> None:
        self.task, self.cap, self.most_points = task, cap, most_points
        self.groups = sorted(_groups(task), key=lambda group: max(layer.start for layer in group))
        early = min((layer.start for layer in task.layers), default=0) - 1
        free = set(task.passing(early))
        self.free = [
            {n for one in g for o in task.options[one.name] for kept in o.kept for n in (kept, kept[:-1])} & free
            for g in self.groups
        ]
        most = Limits(task.limits.bytes - task.profile.weights_bytes, task.limits.step_ms)
        self.fronts: list[_Front] = [_Front.empty()]
        for group in reversed(self.groups):
            self.fronts.append(self.fronts[-1].plus(self.items(group, early), most, most_points))
        self.fronts.reverse()  # fronts[n]: over groups n and later

    def best(self, start: int) -> tuple[float, float, dict[str, Part]] | None:
        """Value, bytes (negative) and parts of the best choice in which no layer before `start` trains."""
        task = self.task
        taken, ms = task.base(start)
        taken += self.cap or 0
        limit = task.limits.step_ms
        limits = Limits(task.limits.bytes - taken, None if limit is None else limit - ms)
        if limits.bytes < 0 or (limits.step_ms is not None and limits.step_ms < 0):
            return None
        passing = task.passing(start)
        cut = [
            number
            for number, group in enumerate(self.groups)
            if min(layer.start for layer in group) <= start or any(name not in passing for name in self.free[number])
        ]
        uncut_from = max(cut, default=-1) + 1
        front = self.fronts[uncut_from]
        for group in reversed(self.groups[:uncut_from]):
            if left := [layer for layer in group if layer.start >= start]:
                front = front.plus(self.items(left, start), limits, self.most_points)
        found = front.best(limits)
        return None if found is None else (found[1], -(found[0] + taken), found[2])

    def items(self, group: Sequence[Layer], start: int) -> _Items:
        """Every combination of the group's parts that no other beats."""
        lists: list[list[tuple[Option, dict[StorageName, int]]]] = []
        for layer in group:
            options = [o for o in self.task.options[layer.name] if self.cap is None or o.largest <= self.cap]
            lists.append([(option, self.task.extra(layer, option, start)) for option in options])
        users: dict[StorageName, set[int]] = {}
        sizes: dict[StorageName, int] = {}
        for number, options_of in enumerate(lists):
            for _, kept in options_of:
                sizes |= kept
                for name in kept:
                    users.setdefault(name, set()).add(number)
        shared = [name for name, numbers in users.items() if len(numbers) > 1]
        parts: list[dict[str, Part]] = []
        rows: list[np.ndarray] = []
        for paid in _subsets(shared):  # once what is shared is paid for, the layers add up
            cost, chosen = np.array([[float(sum(sizes[name] for name in paid)), 0.0, 0.0]]), [dict[str, Part]()]
            for layer, options_of in zip(group, lists, strict=True):
                able = [(o, kept) for o, kept in options_of if all(n in paid for n in kept if n in shared)]
                more = [
                    (o.bytes + sum(size for n, size in kept.items() if n not in paid), o.ms, o.value)
                    for o, kept in able
                ]
                cost = (cost[:, None, :] + np.array(more).reshape(1, -1, 3)).reshape(-1, 3)
                keep = _undominated(cost, self.task.limits.step_ms is not None)
                chosen = [{**chosen[n // len(able)], layer.name: able[n % len(able)][0].part} for n in keep.tolist()]
                cost = cost[keep]
            rows.append(cost)
            parts += chosen
        cost = np.concatenate(rows)
        keep = _undominated(cost, self.task.limits.step_ms is not None)
        return _Items([parts[n] for n in keep.tolist()], cost[keep])


def _subsets(names: list[StorageName], most: int = 6) -> list[frozenset[StorageName]]:
    """All subsets; of many names only none and all, which never pays too little."""
    if len(names) > most:
        return [frozenset(), frozenset(names)]
    return [frozenset(c) for count in range(len(names) + 1) for c in itertools.combinations(names, count)]


def _groups(task: Task) -> list[list[Layer]]:
    """Layers that have to be chosen together, because what one keeps another may keep too."""
    owner: dict[StorageName, int] = {}
    member = list(range(len(task.layers)))

    def root(number: int) -> int:
        while member[number] != number:
            number = member[number]
        return number

    for number, layer in enumerate(task.layers):
        for option in task.options[layer.name]:
            for name in {**option.kept, **option.alone}:
                member[root(number)] = root(owner.setdefault(name, number))
    groups: dict[int, list[Layer]] = {}
    for number, layer in enumerate(task.layers):
        groups.setdefault(root(number), []).append(layer)
    return list(groups.values())


def _undominated(cost: np.ndarray, timed: bool) -> np.ndarray:
    """Rows `(bytes, ms, value)` that no other row beats in all three; without a time limit, ms does not count."""
    order = np.lexsort((-cost[:, 2], cost[:, 0]))
    if not timed:
        values = cost[order, 2]
        before = np.concatenate(([-np.inf], np.maximum.accumulate(values)[:-1])) if len(values) else values
        kept_rows: np.ndarray = order[values > before]
        return kept_rows
    kept: list[int] = []
    for row in order.tolist():  # few rows: the combinations of one group
        if not any(cost[other, 1] <= cost[row, 1] and cost[other, 2] >= cost[row, 2] for other in kept):
            kept.append(row)
    return np.array(kept, dtype=np.int64)


class _Front:
    """Points `(bytes, ms, value)` and how each came to be."""

    def __init__(self, cost: np.ndarray, before: _Front | None, origin: np.ndarray, items: _Items | None) -> None:
        self.cost, self.before, self.origin, self.items = cost, before, origin, items

    @classmethod
    def empty(cls) -> _Front:
        """Nothing trains."""
        return cls(np.zeros((1, 3)), None, np.zeros(1, dtype=np.int64), None)

    def plus(self, items: _Items, limits: Limits, most_points: int) -> _Front:
        """Every point with every item, less those that are over the limits or beaten."""
        cost = (self.cost[:, None, :] + items.cost[None, :, :]).reshape(-1, 3)
        inside = cost[:, 0] <= limits.bytes
        if limits.step_ms is not None:
            inside &= cost[:, 1] <= limits.step_ms
        numbers = np.flatnonzero(inside)
        cost = cost[numbers]
        timed = limits.step_ms is not None
        keep = np.arange(len(cost)) if timed and len(cost) > 512 else _undominated(cost, timed)
        keep = _thinned(cost, keep, limits, most_points)
        return _Front(cost[keep], self, numbers[keep], items)

    def best(self, limits: Limits) -> tuple[float, float, dict[str, Part]] | None:
        """Bytes, value and parts of the point with the largest value, and of those the fewest bytes."""
        inside = self.cost[:, 0] <= limits.bytes
        if limits.step_ms is not None:
            inside &= self.cost[:, 1] <= limits.step_ms
        candidates = np.flatnonzero(inside)
        if not len(candidates):
            return None
        number = int(candidates[np.lexsort((self.cost[candidates, 0], -self.cost[candidates, 2]))[0]])
        taken, value = float(self.cost[number, 0]), float(self.cost[number, 2])
        front, parts = self, dict[str, Part]()
        while front.items is not None and front.before is not None:
            number, item = divmod(int(front.origin[number]), len(front.items.parts))
            parts.update(front.items.parts[item])
            front = front.before
        return taken, value, parts


def _thinned(cost: np.ndarray, order: np.ndarray, limits: Limits, most_points: int) -> np.ndarray:
    """At most so many of the rows: in each cell of bytes (and ms) the one with the largest value."""
    if len(order) <= most_points:
        return order
    cells = most_points if limits.step_ms is None else max(1, int(most_points**0.5))
    place = np.floor(cost[order, 0] / max(limits.bytes, 1e-9) * (cells - 1)).astype(np.int64)
    if limits.step_ms is not None:
        place = place * cells + np.floor(cost[order, 1] / max(limits.step_ms, 1e-9) * (cells - 1)).astype(np.int64)
    by_value = np.lexsort((cost[order, 0], -cost[order, 2]))
    first = np.unique(place[by_value], return_index=True)[1]
    kept: np.ndarray = order[by_value[first]]
    return kept
