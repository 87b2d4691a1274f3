from __future__ import annotations

import itertools
import random

import pytest

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.sparse.auto.account import CostModel, LayerCost, OptimizerSpec
from edgetune.sparse.auto.search import Limits, Solution, Values, find_scheme
from edgetune.sparse.auto.timing import QUARTER, Times
from edgetune.sparse.auto.trace import Save
from edgetune.sparse.scheme import Part, Slice

HALF, EIGHTH = Slice(ratio=0.5), Slice(ratio=0.125)


def profile_of(seed: int, layers: int) -> CostModel:
    """A network drawn at random: some layers share an input, some inputs are also kept by what stands before them."""
    chance = random.Random(seed)
    found, between, clock = [], [], 1
    shared: Save | None = None
    for number in range(layers):
        name = f"layer{number}"
        width, rows = chance.choice((8, 16, 24)), chance.choice((4, 32, 100))
        if shared is None or chance.random() < 0.5:
            shared = Save(clock, name, ("in", number), 4 * rows * width, 4 * rows * width)
            if chance.random() < 0.4:  # the operator before this layer keeps it too
                between.append(shared._replace(clock=max(0, clock - 1), owner=None))
        own = Save(clock, name, ("own", number), 4 * rows * chance.randrange(8), 0)
        passing = (own,) if chance.random() < 0.5 else ()
        kept = (*passing, shared._replace(owner=name, clock=clock))
        between.append(Save(clock + 1, None, ("between", number), 4 * rows * chance.randrange(12), 0))
        bias = {"bias": width} if chance.random() < 0.7 else {}
        found.append(
            LayerCost(
                name=name, start=clock, end=clock + 1, parameters={"weight": width * width, **bias}, element_bytes=4,
                shared=False, trainable=True, channels={"inputs": (width, 1), "outputs": (width, 1)},
                whole_input=frozenset({"outputs"}), macs=rows * width * width,
                saves={"frozen": passing, "bias": passing, "full": kept, "first": kept[-1:]},
            )
        )  # fmt: skip
        clock += 2
    passing = tuple(0.1 for _ in range(clock + 1))
    parts: dict[str, dict[Part, float]] = {}
    for layer in found:
        ms = chance.random()
        parts[layer.name] = {"bias": 0.01, QUARTER: 0.1 + ms / 4, "full": 0.1 + ms}
    times = Times(passing, passing, passing, parts, (0.01, 1e-5))
    return CostModel(tuple(found), tuple(between), (0,) * (clock + 1), times, 10_000)


def values_of(profile: CostModel, seed: int, parts: tuple[Part, ...] = ("bias", EIGHTH, HALF, "full")) -> Values:
    chance = random.Random(seed)
    found: dict[str, dict[Part, float]] = {}
    for layer in profile.layers:
        worth = sorted(chance.choice((0.0, 1.0, chance.random(), 3 * chance.random())) for _ in parts)
        found[layer.name] = {p: v for p, v in zip(parts, worth, strict=True) if layer.sizes(p)}
    return found


def brute_force(
    profile: CostModel, values: Values, limits: Limits, fixed: dict[str, Part], spec: OptimizerSpec
) -> tuple[float, int] | None:
    """The best value and the least bytes for it, by trying everything."""
    best: tuple[float, int] | None = None
    lists = [[(fixed[n], 0.0)] if n in fixed else [("frozen", 0.0), *parts.items()] for n, parts in values.items()]
    for chosen in itertools.product(*lists):
        parts = {n: part for n, (part, _) in zip(values, chosen, strict=True) if part != "frozen"}
        if not parts or (limits.step_ms is not None and profile.step_ms(parts) > limits.step_ms):
            continue
        taken = profile.account(parts, spec).total_bytes
        value = sum(worth for _, worth in chosen)
        if taken <= limits.bytes and (best is None or (value, -taken) > (best[0], -best[1])):
            best = (value, taken)
    return best


def agree(found: Solution, expected: tuple[float, int]) -> None:
    assert found.value == pytest.approx(expected[0], rel=1e-9)
    assert found.bytes == expected[1]


@pytest.mark.parametrize("seed", range(25))
def test_exactly_finds_what_trying_everything_finds(seed: int) -> None:
    profile = profile_of(seed, layers=4)
    values = values_of(profile, seed)
    chance = random.Random(seed)
    fixed: dict[str, Part] = {"layer3": "full"} if seed % 3 == 0 else {}
    spec = OptimizerSpec(in_backward=seed % 4 == 1, optimizer="sgd" if seed % 5 == 2 else "adamw")
    most = profile.account(dict.fromkeys(values, "full"), spec).total_bytes
    limits = Limits(10_000 + chance.random() * (most - 10_000), None if seed % 2 else (0.3 + 0.7 * chance.random()) * 4)
    expected = brute_force(profile, values, limits, fixed, spec)
    if expected is None:
        with pytest.raises(EdgetuneError, match="lowest possible"):
            find_scheme(profile, values, limits, fixed=fixed, optimizer=spec)
        return
    agree(find_scheme(profile, values, limits, fixed=fixed, optimizer=spec), expected)


def test_few_points_lose_little_and_never_exceed_the_budget() -> None:
    profile = profile_of(1, layers=40)
    values = values_of(profile, 1)
    limits = Limits(60_000)
    best, rough = find_scheme(profile, values, limits), find_scheme(profile, values, limits, most_points=256)
    assert rough.bytes <= best.bytes or rough.bytes <= limits.bytes
    assert 0.97 * best.value <= rough.value <= best.value


def test_a_budget_that_cannot_be_met_says_the_least_that_can() -> None:
    profile = profile_of(2, layers=6)
    values = values_of(profile, 2)
    least = min(
        profile.account({n: part}).total_bytes for n, parts in values.items() for part in parts
        if profile.layer(n).sizes(part)
    )  # fmt: skip
    with pytest.raises(EdgetuneError, match=rf"lowest possible is {least / 2**20:.1f} MiB") as error:
        find_scheme(profile, values, Limits(5_000))
    assert error.value.exit_code == Exit.BUDGET
    agreed = find_scheme(profile, values, Limits(least))
    assert agreed.bytes == least


def test_unknown_layers_are_refused() -> None:
    profile = profile_of(4, layers=2)
    with pytest.raises(EdgetuneError, match="no such layer"):
        find_scheme(profile, {"elsewhere": {"full": 1.0}}, Limits(1e9))
