"""Costs: laws of the predictor, the fit against a machine whose truth is known, and the published figures."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from edgetune.profile import cost, device, fit
from edgetune.profile.operators import DType, Kind, Operator
from edgetune.profile.rates import DEFAULT_BANDWIDTH_GB_S, Rates, rates_of
from edgetune.profile.reference import mobilenet_v2
from edgetune.technique import EdgetuneError

KINDS: tuple[Kind, ...] = (
    "conv", "pointwise-conv", "depthwise-conv", "linear", "matmul", "embedding", "normalization", "softmax",
    "elementwise", "reduction", "pooling", "data-movement", "other",
)  # fmt: skip
DTYPES: tuple[DType, ...] = ("fp32", "fp16", "bf16", "int8", "8da4w")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def operator(
    kind: Kind = "linear",
    dtype: DType = "fp32",
    *,
    macs: int = 1_000_000,
    weights: int = 100_000,
    activations: int = 100_000,
    delegated: bool = True,
) -> Operator:
    return Operator(
        operator=f"aten.{kind}.default",
        module="",
        kind=kind,
        dtype=dtype,
        output_shape=(1, activations // 8),
        macs=macs,
        weight_bytes=weights,
        activation_bytes=activations,
        delegated=delegated,
    )


@pytest.mark.parametrize("name", device.ids())
def test_every_prediction_is_a_positive_number_inside_its_band(name: str) -> None:
    described = device.load(name)
    for kind in KINDS:
        for dtype in DTYPES:
            for delegated in (True, False):
                for scale in (0, 1, 10**6, 10**12):
                    one = operator(kind, dtype, macs=scale, weights=scale, activations=scale, delegated=delegated)
                    predicted = cost.predict([one], described)
                    numbers = (predicted.latency_low_ms, predicted.latency_ms, predicted.latency_high_ms)
                    assert all(math.isfinite(n) and n > 0 for n in numbers), (kind, dtype, scale)
                    assert numbers[0] < numbers[1] < numbers[2]
                    assert math.isfinite(predicted.peak_memory_mib)
                    assert predicted.peak_memory_mib > 0
                    assert not predicted.calibrated
                    assert "not calibrated" in predicted.note


def test_more_work_costs_more_and_a_program_is_the_sum_of_its_operators() -> None:
    described = device.load("pixel-8")
    small, large = operator(macs=10**7), operator(macs=10**8)
    one, two = (cost.predict([item], described).latency_ms for item in (small, large))
    both = cost.predict([small, large], described).latency_ms
    fixed = cost.fixed_of(described)
    shared_ms = (fixed.call + fixed.delegate_call) / 1e3
    assert two > 5 * one
    assert both == pytest.approx(one + two - shared_ms)


def test_an_operator_left_to_portable_kernels_costs_more() -> None:
    described = device.load("pixel-8")
    taken = cost.predict([operator(delegated=True, macs=10**8)], described)
    left = cost.predict([operator(delegated=False, macs=10**8)], described)
    assert left.latency_ms > 5 * taken.latency_ms
    assert left.latency_high_ms / left.latency_ms > taken.latency_high_ms / taken.latency_ms


def test_delegate_calls_are_counted_as_runs() -> None:
    yes, no = operator(), operator(delegated=False)
    assert cost.delegate_calls_of([yes, yes, no, yes, no, no]) == 2
    assert cost.delegate_calls_of([no]) == 0
    described = device.load("pixel-8")
    apart = cost.predict([yes, no, yes], described).latency_ms
    together = cost.predict([yes, yes, no], described).latency_ms
    assert apart - together == pytest.approx(cost.fixed_of(described).delegate_call / 1e3)


def test_isa_flags_make_eight_bits_faster_and_nothing_else() -> None:
    big = 10**9
    for name, at_least in (("galaxy-s24", 3.0), ("raspberry-pi-5", 1.8)):
        described = device.load(name)
        fp32 = cost.predict([operator(dtype="fp32", macs=big)], described).latency_ms
        int4 = cost.predict([operator(dtype="8da4w", macs=big)], described).latency_ms
        assert fp32 / int4 > at_least
    described = device.load("raspberry-pi-4")  # neither dotprod nor i8mm
    fp32 = cost.predict([operator(dtype="fp32", macs=big)], described).latency_ms
    assert fp32 / cost.predict([operator(dtype="int8", macs=big)], described).latency_ms < 1.5


def test_what_nobody_knows_is_said_and_widens_the_band() -> None:
    described = device.load("pixel-8")
    bound_by_memory = operator(macs=10, weights=10**9)
    predicted = cost.predict([bound_by_memory], described)
    assert f"memory bandwidth unknown: the phone default of {DEFAULT_BANDWIDTH_GB_S['phone']:g} GB/s" in predicted.note
    known = cost.predict([bound_by_memory], device.load("galaxy-s22"))
    assert "bandwidth" not in known.note
    assert predicted.latency_high_ms / predicted.latency_ms > known.latency_high_ms / known.latency_ms
    eight_bits = cost.predict([operator(dtype="int8", macs=10**9)], device.load("iphone-15-pro"))
    assert "ISA flags unknown" in eight_bits.note


def test_low_trust_widens_the_band() -> None:
    trusted = device.load("raspberry-pi-5")
    cluster = trusted.clusters[0]
    fact = cluster.ghz
    doubtful = trusted.model_copy(
        update={"clusters": (cluster.model_copy(update={"ghz": fact.model_copy(update={"trust": "low"})}),)}
    )
    lanes = cluster.fp32_macs_per_cycle.model_copy(update={"trust": "high"})
    sure = trusted.model_copy(update={"clusters": (cluster.model_copy(update={"fp32_macs_per_cycle": lanes}),)})
    program = [operator(macs=10**9)]
    wide, narrow = (cost.predict(program, d) for d in (doubtful, sure))
    assert wide.latency_ms == narrow.latency_ms
    assert wide.latency_high_ms > narrow.latency_high_ms


def test_peak_memory_is_plan_program_packed_weights_workspace_and_runtime() -> None:
    mib = 1024 * 1024
    program = [
        operator(weights=4 * mib, activations=mib),
        operator(weights=2 * mib, activations=9 * mib, delegated=False),
    ]
    assert cost.peak_memory_mib(program, 3 * mib, 5 * mib) == pytest.approx(3 + 5 + 4 + 1 + cost.RUNTIME_MIB)
    # an embedding table of 90 MiB of which 6 are read
    assert cost.peak_memory_mib(program, 0, 90 * mib) == pytest.approx(6 + 4 + 1 + cost.RUNTIME_MIB)
    assert cost.peak_memory_mib(program) == pytest.approx(6 + 4 + 1 + cost.RUNTIME_MIB)
    huge = cost.predict([operator(weights=20 * 1024 * mib)], device.load("raspberry-pi-5"))
    assert "more than the 8 GiB fitted" in huge.note


def test_what_the_backend_folds_into_a_layer_costs_nothing() -> None:
    def named(name: str, kind: Kind, delegated: bool = True) -> Operator:
        return operator(kind, delegated=delegated).model_copy(update={"operator": f"aten.{name}.default"})

    conv, norm, clamp = named("conv2d", "conv"), named("batch_norm", "normalization"), named("relu6", "elementwise")
    add = named("add", "elementwise")
    assert cost.unfolded([conv, norm, clamp, add]) == (conv, add)
    assert cost.unfolded([conv, add, clamp]) == (conv, add, clamp)  # a sum takes no clamp of ours
    left = named("batch_norm", "normalization", delegated=False)
    assert cost.unfolded([conv, left, clamp]) == (conv, left, clamp)
    described = device.load("pixel-8")
    assert cost.predict([conv, norm, clamp], described).latency_ms == cost.predict([conv], described).latency_ms


def test_training_memory_is_the_sum_of_what_was_measured() -> None:
    total = cost.train_memory_mib(weights_mib=1.0, gradients_mib=2.0, optimizer_state_mib=4.0, kept_activations_mib=8.0)
    assert total == 15.0
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(EdgetuneError, match="gradients_mib"):
            cost.train_memory_mib(weights_mib=1.0, gradients_mib=bad, optimizer_state_mib=0.0, kept_activations_mib=0.0)


def test_senseless_programs_are_refused() -> None:
    described = device.load("pixel-8")
    with pytest.raises(EdgetuneError, match="without operators"):
        cost.predict([], described)
    with pytest.raises(EdgetuneError, match="cannot be negative"):
        cost.predict([operator(macs=-1)], described)
    with pytest.raises(EdgetuneError, match="plan_bytes"):
        cost.predict([operator()], described, plan_bytes=-1)
    with pytest.raises(EdgetuneError, match="larger than any program"):
        cost.predict([operator(macs=10**400)], described)


def test_priors_against_the_published_rows() -> None:
    """MobileNetV2 on a Pi 4 by XNNPACK: 46 ms. A factor of two is all that priors promise."""
    predicted = cost.predict(mobilenet_v2(), device.load("raspberry-pi-4"))
    assert 46 / 2 < predicted.latency_ms < 46 * 2
    assert predicted.latency_low_ms < 46 < predicted.latency_high_ms
    # prefill of Llama 3.2 1B on a OnePlus 12: 60.3 tokens/s in bf16, 260.5 with 8da4w, at 128 tokens
    described, tokens, macs = device.load("oneplus-12"), 128, 128 * 973_146_112
    for dtype, published in (("bf16", 60.3), ("8da4w", 260.5)):
        program = [operator(dtype=dtype, macs=macs, weights=10**9)]  # type: ignore[arg-type]
        assert tokens / (cost.predict(program, described).latency_ms / 1e3) == pytest.approx(published, rel=0.25)


# --- the fit, against a machine whose truth is known ---

TRUTH: dict[fit.Key, fit.Shares] = {
    ("linear", "fp32", True): (0.6, 0.5),
    ("linear", "8da4w", True): (0.12, 0.3),
    ("elementwise", "fp32", True): (0.3, 0.9),
    ("normalization", "fp32", False): (0.02, 0.1),
}
FIXED = cost.Fixed(call=12.0, delegate_call=6.0, delegated=1.5, portable=3.0)


def true_us(program: tuple[Operator, ...], rates: Rates) -> float:
    cached = cost.weights_cached(program, rates)
    total = FIXED.call + cost.delegate_calls_of(program) * FIXED.delegate_call
    for item in program:
        compute, memory = TRUTH[fit.key_of(item)]
        total += max(cost.compute_us(item, rates) / compute, cost.memory_us(item, rates, cached) / memory)
        total += FIXED.delegated if item.delegated else FIXED.portable
    return total


def machine(noise: float, seed: int) -> tuple[list[fit.Timed], Rates]:
    rates, draw = rates_of(device.load("raspberry-pi-5")), random.Random(seed)
    timed = []
    for kind, dtype, delegated in TRUTH:
        # some bound by arithmetic, some by memory: both shares can be told
        for macs, weights in ((10**7, 10**4), (10**8, 10**5), (10**5, 10**7), (10**6, 4 * 10**7)):
            item = operator(kind, dtype, macs=macs, weights=weights, activations=weights, delegated=delegated)
            us = true_us((item,), rates) * math.exp(draw.gauss(0, noise))
            timed.append(fit.Timed(f"{kind}-{dtype}-{macs}", (item,), int(delegated), us))
    return timed, rates


def test_the_fit_finds_the_shares_of_a_known_machine() -> None:
    timed, rates = machine(noise=0.0, seed=0)
    found = fit.fit(timed, rates, FIXED)
    for efficiency in found.efficiencies:
        compute, memory = TRUTH[efficiency.kind, efficiency.dtype, efficiency.delegated]
        assert efficiency.compute == pytest.approx(compute, rel=0.05)
        assert efficiency.memory == pytest.approx(memory, rel=0.05)
        assert efficiency.programs == 4
    assert max(found.errors_pct.values()) < 10


def test_a_share_that_no_program_was_bound_by_keeps_a_wide_band() -> None:
    timed, rates = machine(noise=0.0, seed=0)
    arithmetic = [item for item in timed if item.name in ("linear-fp32-10000000", "linear-fp32-100000000")]
    (found,) = fit.fit(arithmetic, rates, FIXED).efficiencies
    assert (found.compute_told, found.memory_told) == (True, False)
    section = calibrated().calibration
    assert section is not None
    described = device.load("raspberry-pi-5").model_copy(
        update={"calibration": section.model_copy(update={"efficiencies": (found,)})}
    )
    told, guessed = (
        cost.predict([operator(macs=macs, weights=weights)], described) for macs, weights in ((10**9, 1), (1, 10**9))
    )
    assert guessed.latency_high_ms / guessed.latency_ms > told.latency_high_ms / told.latency_ms


def test_noise_shows_in_the_error_and_bounds_hold() -> None:
    timed, rates = machine(noise=0.2, seed=1)
    found = fit.fit(timed, rates, FIXED)
    assert 5 < sorted(found.errors_pct.values())[-3] < 150
    for efficiency in found.efficiencies:
        assert fit.COMPUTE_BOUNDS[0] <= efficiency.compute <= fit.COMPUTE_BOUNDS[1]
        assert fit.MEMORY_BOUNDS[0] <= efficiency.memory <= fit.MEMORY_BOUNDS[1]


def test_a_single_program_of_its_kind_has_no_error_to_show() -> None:
    timed, rates = machine(noise=0.0, seed=0)
    found = fit.fit(timed[:1], rates, FIXED)
    assert found.errors_pct == {}
    assert found.efficiencies[0].error_pct is None


def test_fixed_costs_from_tiny_programs_never_turn_negative() -> None:
    one, portable = operator(macs=0, weights=0, activations=64), operator(delegated=False, macs=0, weights=0)

    def tiny(name: str, item: Operator, times: int, us: float) -> fit.Timed:
        return fit.Timed(name, (item,) * times, int(item.delegated), us)

    found = fit.fixed_costs(
        tiny("a", one, 1, 20.0), tiny("b", one, 11, 35.0), tiny("c", portable, 1, 15.0), tiny("d", portable, 11, 45.0)
    )
    assert found == cost.Fixed(call=12.0, delegate_call=6.5, delegated=1.5, portable=3.0)
    turned = fit.fixed_costs(
        tiny("a", one, 1, 20.0), tiny("b", one, 11, 10.0), tiny("c", portable, 1, 40.0), tiny("d", portable, 11, 5.0)
    )
    assert min(turned.call, turned.delegate_call, turned.delegated, turned.portable) > 0
    with pytest.raises(EdgetuneError, match="more operators"):
        fit.fixed_costs(
            tiny("a", one, 2, 1.0), tiny("b", one, 2, 1.0), tiny("c", portable, 1, 1.0), tiny("d", portable, 2, 1.0)
        )


def test_a_latency_that_is_no_positive_number_is_refused() -> None:
    timed, rates = machine(noise=0.0, seed=0)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(EdgetuneError, match="latency must be positive"):
            fit.fit([fit.Timed("x", timed[0].operators, 1, bad)], rates, FIXED)


def calibrated(name: str = "raspberry-pi-5") -> device.Device:
    timed, rates = machine(noise=0.0, seed=0)
    found = fit.fit(timed, rates, FIXED)
    section = device.Calibration(
        date="2026-01-31",
        engine="a test",
        versions={},
        threads=4,
        programs=len(timed),
        error_pct=8.0,
        error_p90_pct=30.0,
        call_us=FIXED.call,
        delegate_call_us=FIXED.delegate_call,
        delegated_operator_us=FIXED.delegated,
        portable_operator_us=FIXED.portable,
        efficiencies=found.efficiencies,
    )
    return device.load(name).model_copy(update={"calibration": section})


def test_a_calibrated_device_predicts_its_own_machine() -> None:
    described = calibrated()
    program = (
        operator(macs=3 * 10**7),
        operator("elementwise", macs=10**6),
        operator("normalization", delegated=False),
    )
    predicted = cost.predict(program, described)
    assert predicted.latency_ms == pytest.approx(true_us(program, rates_of(described)) / 1e3, rel=0.05)
    assert predicted.calibrated
    assert "calibrated 2026-01-31" in predicted.note
    uncalibrated = cost.predict(program, device.load("raspberry-pi-5"))
    assert predicted.latency_high_ms / predicted.latency_ms < uncalibrated.latency_high_ms / uncalibrated.latency_ms


def test_a_kind_never_calibrated_is_a_named_wider_guess() -> None:
    described = calibrated()
    predicted = cost.predict([operator(), operator("conv", "int8", macs=10**9)], described)
    assert "delegated int8 conv was never calibrated: a guess for" in predicted.note
    known = cost.predict([operator()], described)
    assert predicted.latency_high_ms / predicted.latency_ms > known.latency_high_ms / known.latency_ms
