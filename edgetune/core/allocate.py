"""Choose one option for each of several items: the largest sum of values whose costs stay within limits.

A multiple-choice knapsack with one limit for each kind of cost, solved by dynamic programming over the items: of the
sums of costs and value so far, only those that no other sum dominates are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from edgetune.core.errors import EdgetuneError, Exit

Name = TypeVar("Name")
MOST_POINTS = 8192
_FEW = 512  # points among which those that others beat are looked for where there are several kinds of cost


@dataclass(frozen=True)
class Option(Generic[Name]):
    """One choice for an item: its value, and its cost of each kind."""

    name: Name
    value: float
    costs: Mapping[str, float]


def allocate(
    options: Mapping[str, Sequence[Option[Any]]], limits: Mapping[str, float], *, most_points: int = MOST_POINTS
) -> dict[str, Option[Any]]:
    """Choose the option of each item so that the sum of values is largest; among equal sums, the cheapest.

    Costs of one kind add up to at most its limit. Exact as long as no more than `most_points` sums matter after an
    item; beyond that, only the best sum in each cell of a grid over the costs is kept.

    >>> bits = {"first": [Option(4, 0.2, {"kib": 4}), Option(8, 1.0, {"kib": 8})],
    ...         "last": [Option(4, 0.7, {"kib": 4}), Option(8, 0.9, {"kib": 8})]}
    >>> {layer: option.name for layer, option in allocate(bits, {"kib": 12}).items()}
    {'first': 8, 'last': 4}

    Raises:
        EdgetuneError: (exit code 4) no choice is within the limits; it says the least that can be had.
    """
    if empty := [name for name, own in options.items() if not own]:
        raise EdgetuneError(f"item {empty[0]!r} has no option", action="give it one, or leave it out")
    best = _solve(options, limits, most_points)
    if best is None:
        raise _infeasible_error(options, limits)
    return dict(zip(options, best, strict=True))


class Front(Generic[Name]):
    """The Pareto front of sums of costs and value over the items so far, with the options behind each.

    `limits` names the kinds of cost that count; an option may have others. `most_points=None` keeps every point.
    """

    def __init__(self, limits: Mapping[str, float], most_points: int | None = MOST_POINTS) -> None:
        self.limits, self.most_points = dict(limits), most_points
        self.sums = np.zeros((1, len(limits) + 1))  # (points, kinds and the value)
        self._before: Front[Name] | None = None
        self._origin = np.zeros(1, dtype=np.int64)  # of each point: the one before, and the option
        self._options: Sequence[Option[Name]] = ()

    def plus(self, options: Sequence[Option[Name]], limits: Mapping[str, float] | None = None) -> Front[Name]:
        """Add an item: every point with every option, without those over the limits (default: its own) or dominated."""
        front: Front[Name] = Front(self._ordered(limits), self.most_points)
        rows = np.array([[*(option.costs[kind] for kind in self.limits), option.value] for option in options])
        width = len(self.limits) + 1
        sums = (self.sums[:, None, :] + rows.reshape(1, -1, width)).reshape(-1, width)
        numbers = np.flatnonzero(_within(sums, front.limits))
        sums = sums[numbers]
        rough = self.most_points is not None and width > 2 and len(sums) > _FEW
        keep = np.arange(len(sums)) if rough else _pareto_indices(sums)
        if self.most_points is not None and len(keep) > self.most_points and front.limits:
            keep = _thin_out(sums, keep, front.limits, self.most_points)
        front.sums, front._before, front._origin, front._options = sums[keep], self, numbers[keep], options
        return front

    def best(self, limits: Mapping[str, float] | None = None) -> Option[tuple[Option[Name], ...]] | None:
        """The point of the largest value within the limits (default: its own), the cheapest of equal ones.

        Its name is the options of the items in order; `None` if no point is within.
        """
        inside = np.flatnonzero(_within(self.sums, self._ordered(limits)))
        if not len(inside):
            return None
        kinds = range(len(self.limits) - 1, -1, -1)
        order = np.lexsort((*(self.sums[inside, kind] for kind in kinds), -self.sums[inside, -1]))
        return self._point(int(inside[order[0]]))

    def points(self) -> list[Option[tuple[Option[Name], ...]]]:
        """Each point as one option that combines its items."""
        return [self._point(number) for number in range(len(self.sums))]

    def _ordered(self, limits: Mapping[str, float] | None) -> dict[str, float]:
        limits = limits or self.limits
        return {kind: limits[kind] for kind in self.limits}

    def _point(self, number: int) -> Option[tuple[Option[Name], ...]]:
        *costs, value = self.sums[number].tolist()
        chosen: list[Option[Name]] = []
        front = self
        while front._before is not None:
            number, option = divmod(int(front._origin[number]), len(front._options))
            chosen.append(front._options[option])
            front = front._before
        return Option(tuple(reversed(chosen)), value, dict(zip(self.limits, costs, strict=True)))


def _solve(
    options: Mapping[str, Sequence[Option[Any]]], limits: Mapping[str, float], most_points: int
) -> tuple[Option[Any], ...] | None:
    least = {kind: [min(option.costs[kind] for option in own) for own in options.values()] for kind in limits}
    front: Front[Any] = Front(limits, most_points)
    for number, own in enumerate(options.values()):
        room = {kind: limit - sum(least[kind][number + 1 :]) for kind, limit in limits.items()}  # for the items so far
        front = front.plus(own, room)
    best = front.best(limits)
    return None if best is None else best.name


def _infeasible_error(options: Mapping[str, Sequence[Option[Any]]], limits: Mapping[str, float]) -> EdgetuneError:
    """The error, with the lowest cost of each kind that the other limits allow."""
    least = {}
    for kind in limits:
        cheap = {name: [replace(option, value=-option.costs[kind]) for option in own] for name, own in options.items()}
        others = {other: limit for other, limit in limits.items() if other != kind}
        chosen = _solve(cheap, others, MOST_POINTS) or _solve(cheap, {}, MOST_POINTS) or ()
        least[kind] = sum(option.costs[kind] for option in chosen)
    raised = {kind: cost for kind, cost in least.items() if cost > limits[kind]} or least
    return EdgetuneError(
        f"no choice fits {' and '.join(f'{limit:g} {kind}' for kind, limit in limits.items())}; "
        f"the lowest possible is {' or '.join(f'{cost:g} {kind}' for kind, cost in least.items())}",
        action="raise the limit to " + " or ".join(f"{cost:g} {kind}" for kind, cost in raised.items()),
        exit_code=Exit.BUDGET,
    )


def _within(sums: np.ndarray, limits: Mapping[str, float]) -> np.ndarray:
    return np.all(sums[:, :-1] <= np.array(list(limits.values())), axis=1)  # type: ignore[no-any-return]


def _pareto_indices(sums: np.ndarray) -> np.ndarray:
    """The points that no other dominates in every cost and in value, sorted by the first cost."""
    order = np.lexsort((-sums[:, -1], *(sums[:, kind] for kind in range(sums.shape[1] - 2, -1, -1))))
    values = sums[order, -1]
    if sums.shape[1] <= 2:  # one cost, in whose order the values have to rise
        before = np.concatenate(([-np.inf], np.maximum.accumulate(values)[:-1])) if len(values) else values
        return order[values > before]  # type: ignore[no-any-return]
    kept: list[int] = []
    for row in order.tolist():
        earlier = sums[kept]
        if not ((earlier[:, :-1] <= sums[row, :-1]).all(axis=1) & (earlier[:, -1] >= sums[row, -1])).any():
            kept.append(row)
    return np.array(kept, dtype=np.int64)


def _thin_out(sums: np.ndarray, order: np.ndarray, limits: Mapping[str, float], most: int) -> np.ndarray:
    """At most `most` points: the one of largest value in each cell of a grid over the costs."""
    cells = max(1, int(most ** (1 / len(limits))))
    place = np.zeros(len(order), dtype=np.int64)
    for kind, limit in enumerate(limits.values()):
        costs = sums[order, kind]
        scale = limit if np.isfinite(limit) else costs.max()
        place = place * cells + np.floor(costs / max(scale, 1e-9) * (cells - 1)).astype(np.int64)
    by_value = np.lexsort((sums[order, 0], -sums[order, -1]))
    first = np.unique(place[by_value], return_index=True)[1]
    return order[by_value[first]]  # type: ignore[no-any-return]
