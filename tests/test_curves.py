"""Predictions on a calibrated device: its own kernels, what stands in for those it never saw, and the band of each."""

from __future__ import annotations

import math
import random
from typing import get_args

import pytest

from edgetune.core.ledger import Predicted
from edgetune.profile import cost, curves, device
from edgetune.profile.calibration import Calibration, Curve
from edgetune.profile.terms import curve_of
from edgetune.program.operators import DType, Kind, Operator
from support.machine import KERNELS, Kernel, calibrated, calibration, made, mixes, true_us

KINDS: tuple[Kind, ...] = get_args(Kind)
DTYPES: tuple[DType, ...] = get_args(DType)
KNOWN = made(KERNELS[0], 64, 64, 64)


def width(predicted: Predicted) -> float:
    return predicted.latency_high_ms / predicted.latency_ms


def test_a_calibrated_device_predicts_its_own_machine() -> None:
    described = calibrated()
    for mix in mixes(30, seed=11):
        predicted = cost.predict(mix, described)
        assert predicted.latency_ms == pytest.approx(true_us(mix) / 1e3, rel=0.10)
        assert predicted.calibrated
        assert "never calibrated" not in predicted.note
        assert width(predicted) == pytest.approx(math.exp(calibration().interval_log(predicted.latency_ms * 1e3)))
        assert predicted.interval_pct == 90.0


def test_the_note_says_when_and_how_well_it_was_calibrated() -> None:
    note = cost.predict([KNOWN], calibrated()).note
    assert f"calibrated {calibration().date} with 4 threads" in note
    assert f"{calibration().error_pct:.0f} % (median)" in note


def test_the_band_is_narrower_than_that_of_priors() -> None:
    assert width(cost.predict([KNOWN], calibrated())) < width(cost.predict([KNOWN], device.load("raspberry-pi-5")))


def test_a_known_kernel_in_another_type_stands_in_first() -> None:
    other = made(KERNELS[0], 64, 64, 64, "8da4w")
    (part,) = curves.operator_costs([other], calibrated(), calibration())
    assert part.log == curves.TYPE_LOG
    assert "xnnpack.fully-connected 8da4w was never calibrated, xnnpack.fully-connected" in part.guessed
    predicted = cost.predict([other], calibrated())
    assert f"{part.guessed}: a guess for" in predicted.note
    assert width(predicted) > width(cost.predict([KNOWN], calibrated()))


def test_then_the_nearest_of_its_kind_then_the_prior() -> None:
    new = made(Kernel("xnnpack.prelu", "elementwise"), 64, 64, 1)
    odd = made(Kernel("aten.odd.out", "matmul", delegated=False), 64, 64, 64)
    by_kind, by_prior = curves.operator_costs([new, odd], calibrated(), calibration())
    assert by_kind.guessed == "xnnpack.prelu fp32 was never calibrated, xnnpack.add fp32 stands in"
    assert by_prior.guessed == "aten.odd.out fp32 was never calibrated"
    assert curves.TYPE_LOG < by_kind.log == curves.KIND_LOG < by_prior.log == curves.PRIOR_LOG
    widths = [width(cost.predict([one], calibrated())) for one in (KNOWN, new, odd)]
    assert widths == sorted(set(widths))
    note = cost.predict([KNOWN, new, odd], calibrated()).note
    assert "xnnpack.prelu" in note
    assert "aten.odd.out" in note


def test_a_copy_of_another_form_takes_its_kins_rates_never_nothing() -> None:
    """A transpose that leaves nothing side by side has a term that copies of whole rows do not show."""
    turned = made(KERNELS[10], 64, 64, 1, "int8").model_copy(update={"window": 64})
    (alone,) = curves.operator_costs([turned], calibrated(), calibration())
    assert alone.guessed == "xnnpack.static-transpose int8 was never calibrated in such sizes"
    assert alone.log == curves.PRIOR_LOG
    known = calibration().curves
    fp32 = known["xnnpack.static-transpose fp32"]
    seen = fp32.model_copy(update={"rates": {**fp32.rates, "tiles": 0.9}})
    (part,) = curves.operator_costs(
        [turned], calibrated(), narrowed(curves={**known, "xnnpack.static-transpose fp32": seen})
    )
    assert part.guessed.endswith("in such sizes, xnnpack.static-transpose fp32 stands in")
    assert part.us == pytest.approx(seen.rates["1"] + 0.9 * 64 * 64 / 1e3)


def test_a_delegated_kernel_never_stands_in_for_a_portable_one() -> None:
    slow = made(Kernel("aten.add.out", "elementwise", delegated=False), 64, 64, 1)
    (part,) = curves.operator_costs([slow], calibrated(), calibration())
    assert "stands in" not in part.guessed
    assert part.us > curves.operator_costs([made(KERNELS[11], 64, 64, 1)], calibrated(), calibration())[0].us


def narrowed(**changes: object) -> Calibration:
    return calibration().model_copy(update=changes)


def only(curve: str, *terms: str) -> Calibration:
    """A calibration that saw that kernel in those terms alone."""
    known = calibration().curves[curve]
    rates = {term: rate for term, rate in known.rates.items() if term in ("1", *terms)}
    return narrowed(curves={curve: known.model_copy(update={"rates": rates})})


@pytest.mark.parametrize(("term", "rows", "columns"), [("macs", 1, 256), ("one row", 64, 256), ("macs", 64, 1)])
def test_a_kernel_calibrated_for_other_shapes_alone_is_a_guess(term: str, rows: int, columns: int) -> None:
    """A product of one row or column has a rate of its own: without it the largest term would count nothing."""
    name = "xnnpack.fully-connected fp32"
    operator = made(KERNELS[0], rows, columns, 1024)
    knows = only(name, term)
    (part,) = curves.operator_costs([operator], calibrated(), knows)
    (full,) = curves.operator_costs([operator], calibrated(), calibration())
    assert full.us / 10 < part.us < full.us * 10
    assert part.log > 0
    assert "never calibrated" in part.guessed


def test_every_operator_is_counted_and_no_prediction_is_senseless() -> None:
    described, draw = calibrated(), random.Random(4)
    small = described.model_copy(update={"calibration": narrowed(curves={"x fp32": Curve(
        kind="linear", delegated=True, rates={"macs": 1.0}, programs=1)})})  # fmt: skip
    for _ in range(400):
        kind, dtype = draw.choice(KINDS), draw.choice(DTYPES)
        sizes = [draw.choice((0, 1, 7, 10**4, 10**12)) for _ in range(3)]
        dims = tuple(draw.choice((0, 1, 5, 4096)) for _ in range(draw.randint(0, 4)))
        one = Operator(
            operator=draw.choice(("xnnpack.conv2d", "xnnpack.fully-connected", "aten.odd.out")), module="", kind=kind,
            dtype=dtype, output_shape=dims, macs=sizes[0], weight_bytes=sizes[1], activation_bytes=sizes[2],
            delegated=draw.random() < 0.7, columns=draw.choice((0, 1, 7, 4096)), groups=draw.choice((1, 4)),
            window=draw.choice((1, 9, 49)),
        )  # fmt: skip
        for machine in (described, small):
            (part,) = curves.operator_costs([one], machine, machine.calibration or calibration())
            assert part.us > 0, one
            assert part.guessed or curve_of(one) in calibration().curves
            predicted = cost.predict([one, KNOWN], machine)
            numbers = (predicted.latency_low_ms, predicted.latency_ms, predicted.latency_high_ms)
            assert all(math.isfinite(n) and n > 0 for n in (*numbers, predicted.peak_memory_mib)), one
            assert numbers[0] < numbers[1] < numbers[2]
            assert predicted.latency_ms >= part.us / 1e3


def test_weights_that_no_cache_holds_take_longer() -> None:
    layer = made(KERNELS[0], 1, 300, 300)  # a cache holds it, and not eight of it
    one, eight = (cost.predict([layer] * n, calibrated()).latency_ms for n in (1, 8))
    known = calibration()
    calls_ms = (known.call_us + known.delegate_call_us) / 1e3
    assert eight - calls_ms > 8 * (one - calls_ms) * 1.01


def test_delegate_calls_cost_what_was_fitted() -> None:
    known = calibration()
    two, five = (cost.predict([KNOWN], calibrated(), delegate_calls=n).latency_ms for n in (2, 5))
    assert five - two == pytest.approx(3 * known.delegate_call_us / 1e3)
    assert known.call_us == pytest.approx(8, rel=0.3)
    assert known.delegate_call_us == pytest.approx(3, rel=0.5)


def test_a_cold_start_is_loading_and_one_run() -> None:
    predicted = cost.predict([KNOWN], calibrated(), program_bytes=0)
    assert predicted.cold_start_ms is not None
    assert predicted.cold_start_ms == pytest.approx(predicted.latency_ms + calibration().load_ms, rel=0.01)
