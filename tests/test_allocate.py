"""Allocation against trying everything."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

import pytest

from edgetune.core.allocate import MOST_POINTS, Front, Option

Options = Mapping[str, Sequence[Option[int]]]


def draw(seed: int, kinds: Sequence[str], items: int, most: int = 12) -> Options:
    """Items with some options each; small whole numbers, so that sums and values tie often."""
    chance = random.Random(seed)
    return {
        f"item{item}": [
            Option(number, chance.randrange(-2, 6) / 2, {kind: float(chance.randrange(most)) for kind in kinds})
            for number in range(chance.randrange(1, 5))
        ]
        for item in range(items)
    }


def allocate(
    options: Options, limits: Mapping[str, float], most_points: int = MOST_POINTS
) -> dict[str, Option[int]] | None:
    """The best choice for each item: each prefix of the items leaves room for the least that the others cost."""
    least = {kind: [min(option.costs[kind] for option in own) for own in options.values()] for kind in limits}
    front: Front[int] = Front(limits, most_points)
    for number, own in enumerate(options.values()):
        front = front.plus(own, {kind: limit - sum(least[kind][number + 1 :]) for kind, limit in limits.items()})
    best = front.best(limits)
    return None if best is None else dict(zip(options, best.name, strict=True))


def total(chosen: Sequence[Option[int]], kinds: Sequence[str]) -> tuple[float, ...]:
    """The value, then each cost as a loss."""
    return sum(option.value for option in chosen), *(-sum(option.costs[kind] for option in chosen) for kind in kinds)


def try_all(options: Options, limits: Mapping[str, float]) -> tuple[float, ...] | None:
    """The largest value within the limits, and the least costs for it."""
    kinds = list(limits)
    sums = [total(chosen, kinds) for chosen in itertools.product(*options.values())]
    return max((s for s in sums if all(-c <= limits[k] for k, c in zip(kinds, s[1:], strict=True))), default=None)


@pytest.mark.parametrize("kinds", [("mib",), ("mib", "ms"), ("mib", "ms", "mj")])
@pytest.mark.parametrize("seed", range(40))
def test_the_best_of_all_choices_is_found(seed: int, kinds: tuple[str, ...]) -> None:
    options = draw(seed, kinds, items=1 + seed % 6)
    chance = random.Random(seed)
    limits = {kind: float(chance.randrange(8 * len(options))) for kind in kinds}
    expected, chosen = try_all(options, limits), allocate(options, limits)
    if expected is None or chosen is None:
        assert expected is chosen
        return
    assert list(chosen) == list(options)
    assert all(option in options[name] for name, option in chosen.items())
    assert total(list(chosen.values()), kinds) == pytest.approx(expected)


def test_a_cost_may_be_a_gain() -> None:
    options = {"spends": [Option(0, 0.0, {"mib": 0.0}), Option(1, 5.0, {"mib": 7.0})],
               "gains": [Option(0, 0.0, {"mib": 0.0}), Option(1, -1.0, {"mib": -4.0})]}  # fmt: skip
    assert {name: option.name for name, option in allocate(options, {"mib": 3.0}).items()} == {"spends": 1, "gains": 1}


def test_of_equal_values_the_one_that_costs_least_is_taken() -> None:
    options = {"one": [Option("dear", 1.0, {"mib": 3.0, "ms": 1.0}), Option("cheap", 1.0, {"mib": 2.0, "ms": 5.0}),
                       Option("slow", 1.0, {"mib": 2.0, "ms": 6.0})]}  # fmt: skip
    assert allocate(options, {"mib": 9.0, "ms": 9.0})["one"].name == "cheap"
    assert allocate(options, {"mib": 9.0, "ms": 4.0})["one"].name == "dear"


def test_nothing_to_choose_costs_nothing() -> None:
    assert allocate({}, {"mib": 0.0}) == {}


@pytest.mark.parametrize("kinds", [("mib",), ("mib", "ms")])
def test_few_points_lose_little_and_never_exceed_the_limits(kinds: tuple[str, ...]) -> None:
    chance = random.Random(0)
    options = {
        f"item{item}": [Option(n, n * chance.random(), {k: n * chance.random() for k in kinds}) for n in range(4)]
        for item in range(60)
    }
    limits = dict.fromkeys(kinds, 30.0)
    best, rough = allocate(options, limits, most_points=20_000), allocate(options, limits, most_points=1600)
    exact, lost = (total(list(chosen.values()), kinds) for chosen in (best, rough))
    assert all(-cost <= 30.0 for cost in lost[1:])
    assert 0.95 * exact[0] <= lost[0] <= exact[0] * 1.001


def test_a_front_keeps_what_no_other_point_beats() -> None:
    front: Front[str] = Front({"mib": 10.0})
    front = front.plus([Option("a", 1.0, {"mib": 2.0}), Option("b", 1.0, {"mib": 3.0}), Option("c", 4.0, {"mib": 5.0})])
    front = front.plus([Option("d", 0.0, {"mib": 0.0}), Option("e", 2.0, {"mib": 6.0})])
    points = {tuple(o.name for o in p.name): (p.value, p.costs["mib"]) for p in front.points()}
    assert points == {("a", "d"): (1.0, 2.0), ("c", "d"): (4.0, 5.0)}
    best = front.best({"mib": 4.0})
    assert best is not None
    assert (best.value, best.costs, [option.name for option in best.name]) == (1.0, {"mib": 2.0}, ["a", "d"])
    assert front.best({"mib": 1.0}) is None


def test_limits_may_come_in_any_order() -> None:
    front = Front({"mib": 10.0, "ms": 1.0}).plus([Option("only", 1.0, {"mib": 9.0, "ms": 1.0})])
    assert front.best({"ms": 1.0, "mib": 9.0}) is not None
    assert front.best({"ms": 9.0, "mib": 1.0}) is None
    assert len(Front({"mib": 10.0, "ms": 1.0}).plus(front.points(), {"ms": 1.0, "mib": 9.0}).points()) == 1
