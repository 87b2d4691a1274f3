"""Choose one option for each of several items: the largest sum of values whose costs stay within limits.

A multiple-choice knapsack with one limit for each kind of cost, solved by dynamic programming over the items: of the
sums of costs and value so far, only those that no other sum dominates are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

Name = TypeVar("Name")
MOST_POINTS = 8192
_FEW = 512  # points among which those that others beat are looked for where there are several kinds of cost


@dataclass(frozen=True)
class Option(Generic[Name]):
    """One choice for an item: its value, and its cost of each kind."""

    name: Name
    value: float
    costs: Mapping[str, float]


class Front(Generic[Name]):
    """The Pareto front of sums of costs and value over the items so far, with the options behind each.

    `limits` names the kinds of cost that count; an option may have others. `most_points=None` keeps every point; else
    the best of the front is exact as long as no more than `most_points` sums matter after an item, and beyond that only
    the best sum in each cell of a grid over the costs is kept.

    >>> front = Front({"kib": 12})
    >>> front = front.plus([Option(4, 0.2, {"kib": 4}), Option(8, 1.0, {"kib": 8})])
    >>> front = front.plus([Option(4, 0.7, {"kib": 4}), Option(8, 0.9, {"kib": 8})])
    >>> [option.name for option in front.best().name]
    [8, 4]
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
