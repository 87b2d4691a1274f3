"""The fit against a machine whose truth is known: rates, tiles, errors and bands, from timings with noise."""

from __future__ import annotations

import math
import random
from functools import cache

import pytest

from edgetune.core.errors import EdgetuneError
from edgetune.profile import fit
from edgetune.profile.equations import Timed, calls_of
from edgetune.profile.terms import CALL, DELEGATE, TRAFFIC, WEIGHTS_FAR, KernelTile, curve_of
from edgetune.program.operators import Operator
from support.machine import CACHES, KERNELS, SETTING, TILES, Kernel, made, mixes, programs, true_rate, true_us

GROWN = ("weight_bytes", "activation_bytes")


@cache
def found() -> fit.Fit:
    return fit.fit(fit.shuffle_programs(programs(noise=0.03)), CACHES)


def test_programs_that_were_never_timed_are_predicted() -> None:
    errors = [abs(found().us(mix, CACHES) / true_us(mix) - 1) for mix in mixes(100)]
    assert max(errors) < 0.10


def test_without_noise_the_sums_are_exact() -> None:
    exact = fit.fit(fit.shuffle_programs(programs(noise=0.0)), CACHES)
    assert max(abs(exact.us(mix, CACHES) / true_us(mix) - 1) for mix in mixes(20)) < 5e-3  # the pull to even shares
    left_out = sorted(map(abs, exact.errors.values()))
    assert left_out[len(left_out) * 9 // 10] < 1e-4  # the rest alone show how two terms differ


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_the_tiles_of_each_type_are_found(noise: float) -> None:
    assert fit.fit(fit.shuffle_programs(programs(noise=noise, seed=8)), CACHES).tiles == TILES


def test_a_type_with_few_products_keeps_the_smallest_tile() -> None:
    few = [item for item in programs() if item.operators[0].kind == "linear"][:10]
    assert fit.fit(few, CACHES).tiles == {}
    assert SETTING.tile("8da4w") == KernelTile(rows=1, columns=1)


def test_no_rate_is_negative_whatever_the_noise() -> None:
    for seed in range(3):
        rates = fit.fit(programs(noise=0.6, seed=seed, dtypes=("fp32",)), CACHES).rates
        assert all(math.isfinite(rate) and rate >= 0 for rate in rates.values())
        assert sum(rate > 0 for rate in rates.values()) > 10


def us(operator: Operator) -> float:
    return found().us((operator,), CACHES)


def test_growing_any_size_never_lowers_the_time() -> None:
    draw = random.Random(5)
    for _ in range(300):
        kernel = draw.choice(KERNELS)
        dtype = draw.choice(("fp32", "int8")) if kernel.delegated else "fp32"
        # from two rows: a product of one has a kernel of its own
        size = [int(2 ** draw.uniform(1, 11)), int(2 ** draw.uniform(1, 11)), int(2 ** draw.uniform(0, 11))]
        one = made(kernel, *size, dtype)  # type: ignore[arg-type]
        before = us(one)
        assert math.isfinite(before)
        assert before > 0
        for axis in range(3):
            larger = list(size)
            larger[axis] += draw.choice((1, 3, 100, size[axis]))
            grown = made(kernel, *larger, dtype)  # type: ignore[arg-type]
            if curve_of(grown) != curve_of(one):
                continue  # another kernel: ExecuTorch's layer norm takes half the time from 256 values on
            after = us(grown)
            assert after >= before * (1 - 1e-9), (kernel, dtype, size, larger)
        for name in GROWN:
            after = us(one.model_copy(update={name: getattr(one, name) * 3 + 10**6}))
            assert after >= before * (1 - 1e-9), (kernel, dtype, size, name)


def test_a_longer_program_takes_longer() -> None:
    for mix in mixes(10, seed=9):
        times = [found().us(mix[:length], CACHES) for length in range(1, len(mix) + 1)]
        assert times == sorted(times)


@pytest.mark.parametrize("sigma", [0.1, 0.4])
def test_the_band_holds_nine_of_ten_fresh_errors(sigma: float) -> None:
    draw = random.Random(0)

    def errors(count: int) -> list[float]:
        return [math.exp(draw.gauss(0, sigma)) - 1 for _ in range(count)]

    band = fit.interval_log(errors(400))
    inside = sum(abs(math.log1p(error)) <= band for error in errors(4000)) / 4000
    assert inside == pytest.approx(fit.INTERVAL_PCT / 100, abs=0.04)


def test_few_or_no_errors_give_a_wide_band() -> None:
    assert fit.interval_log([]) == math.log(2)
    assert fit.interval_log([0.2, -0.5, 0.1]) == pytest.approx(math.log(2))  # of three, the largest
    assert fit.interval_log([0.0] * 50) > 0
    assert math.isfinite(fit.interval_log([-1.0, -5.0]))  # predicted nothing at all, or less


def test_the_longest_third_has_an_interval_of_its_own() -> None:
    short, long = [(float(us), 0.3) for us in range(1, 41)], [(float(us), 0.05) for us in range(100, 120)]
    first, second = fit.intervals([*long, *short])
    assert (first.from_us, second.from_us) == (0.0, 100.0)
    assert (first.log, second.log) == pytest.approx((math.log(1.3), math.log(1.05)))
    (only,) = fit.intervals(short[:10])
    assert (only.from_us, only.log) == (0.0, pytest.approx(math.log(1.3)))


def test_errors_are_those_of_programs_left_out() -> None:
    timed = programs(noise=0.03)
    counted = [item for item in timed if item.name in found().errors]  # without those that alone show a term
    assert len(counted) > 0.95 * len(timed)
    fitted_errors = [found().us(item.operators, CACHES) / item.us - 1 for item in counted]
    left_out = [found().errors[item.name] for item in counted]
    assert sum(map(abs, left_out)) > sum(map(abs, fitted_errors))


def test_a_kernel_in_one_program_alone_has_no_error_to_show() -> None:
    timed = [*programs(dtypes=("fp32",)), Timed("alone", (made(KERNELS[0], 8, 8, 8, "int8"),), 20.0)]
    found_too = fit.fit(timed, CACHES)
    assert "alone" not in found_too.errors
    assert len(found_too.errors) > 0.9 * len(timed)
    assert {curve for curve, _ in found_too.rates} > {"xnnpack.fully-connected int8"}


def test_one_wild_timing_moves_nothing_else() -> None:
    timed = programs(noise=0.0, dtypes=("fp32",))
    wild = [Timed(item.name, item.operators, item.us * (8 if n == 5 else 1)) for n, item in enumerate(timed)]
    robust = fit.fit(wild, CACHES)
    assert max(abs(robust.us(mix, CACHES) / true_us(mix) - 1) for mix in mixes(20, dtypes=("fp32",))) < 0.10


def test_what_a_calibration_keeps() -> None:
    timed = programs(noise=0.0)
    exact = fit.fit(timed, CACHES)
    curves = fit.curve_records(exact, timed)
    assert set(curves) == {curve for curve, _ in exact.rates} - {CALL, DELEGATE, TRAFFIC}
    linear = curves["xnnpack.fully-connected fp32"]
    assert (linear.kind, linear.delegated, linear.programs) == ("linear", True, 50)  # with the pointwise convolutions
    assert linear.rates["macs"] == pytest.approx(true_rate(("xnnpack.fully-connected fp32", "macs")), rel=0.01)
    assert linear.error_pct == pytest.approx(0, abs=0.1)
    assert not curves["aten.cumsum.out fp32"].delegated
    assert exact.rates[(TRAFFIC, WEIGHTS_FAR)] == pytest.approx(true_rate((TRAFFIC, WEIGHTS_FAR)), rel=0.05)
    assert {dtype: (tile.rows, tile.columns) for dtype, tile in exact.tiles.items()} == {
        "fp32": (6, 16), "int8": (4, 8),
    }  # fmt: skip


def test_kernels_that_always_come_together_share_their_time_evenly() -> None:
    pair = (made(Kernel("aten.gt.Scalar_out", "elementwise", delegated=False), 4, 8, 1),
            made(Kernel("aten.where.self_out", "elementwise", delegated=False), 4, 8, 1))  # fmt: skip
    both = Timed("both", pair * 4, 80.0)
    timed = [*programs(noise=0.0), both]
    rates = fit.fit(timed, CACHES)
    alone = [rates.us((one,) * 8, CACHES) for one in pair]
    assert alone[0] == pytest.approx(alone[1], rel=0.01)
    assert rates.us(pair * 4, CACHES) == pytest.approx(80.0, rel=0.01)


def test_a_kernel_that_leads_no_program_takes_the_rates_of_its_kin_not_what_is_left_over() -> None:
    reshape = Kernel("xnnpack.static-reshape", "data-movement")
    led = [Timed(f"reshape-{n}", (made(reshape, 4, 8 * n, 1),) * 8, 10.0 + n) for n in range(1, 5)]
    timed = [*programs(noise=0.0), *led]
    long = [index for index, item in enumerate(timed) if "-linear-fp32" in item.name and len(item.operators) == 8]
    once = long[0]
    guest = made(reshape, 4, 8, 1, "int8")
    timed[once] = Timed("guest", (*timed[once].operators, guest, guest), timed[once].us * 1.5)
    assert fit.stand_ins(timed) == {"xnnpack.static-reshape int8": "xnnpack.static-reshape fp32"}
    found = fit.fit(timed, CACHES)
    assert "xnnpack.static-reshape int8" not in fit.curve_records(found, timed)
    assert found.us([guest], CACHES) == pytest.approx(found.us([made(reshape, 4, 8, 1)], CACHES), rel=0.01)


def test_delegate_calls_are_runs_of_delegated_operators() -> None:
    yes, no = made(KERNELS[11], 4, 4, 1), made(KERNELS[14], 4, 4, 1)
    for mix, calls in (((yes, yes, no, yes, no, no), 2), ((no,), 0), ((yes,), 1)):
        assert calls_of(mix) == {(DELEGATE, "1"): calls, (CALL, "1"): 1}


def test_loading_costs_a_fixed_part_and_more_by_size() -> None:
    assert fit.load_costs([(mib, 0.5 + 0.2 * mib) for mib in (0.0, 0.1, 1.0, 8.0, 40.0)]) == pytest.approx((0.5, 0.2))
    assert fit.load_costs([]) == (0.0, 0.0)
    falling = fit.load_costs([(0.0, 9.0), (40.0, 1.0)])  # no slope is negative
    assert min(falling) >= 0


def test_the_order_is_another_and_always_the_same() -> None:
    timed = programs()
    assert fit.shuffle_programs(timed) == fit.shuffle_programs(timed) != timed
    assert sorted(item.name for item in fit.shuffle_programs(timed)) == sorted(item.name for item in timed)


def test_senseless_timings_are_refused() -> None:
    one = (made(KERNELS[0], 4, 4, 4),)
    with pytest.raises(EdgetuneError, match="nothing to fit"):
        fit.fit([], CACHES)
    with pytest.raises(EdgetuneError, match="empty: a timed program has no operators"):
        fit.fit([Timed("empty", (), 1.0)], CACHES)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(EdgetuneError, match="bad: a latency must be positive"):
            fit.fit([Timed("good", one, 1.0), Timed("bad", one, bad)], CACHES)
