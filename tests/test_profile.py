"""Costs on devices that were never calibrated: laws of the predictor, and the published figures."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from edgetune.core.errors import EdgetuneError
from edgetune.profile import cost, device, roofline, terms
from edgetune.profile.rates import CACHE_RATIO, DEFAULT_BANDWIDTH_GB_S, rates_of
from edgetune.profile.reference import NETWORKS
from edgetune.program.operators import DType, Kind, Operator

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


@pytest.mark.parametrize("name", device.device_ids())
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
    fixed = roofline.fixed_of(described)
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
    assert terms.delegate_calls_of([yes, yes, no, yes, no, no]) == 2
    assert terms.delegate_calls_of([no]) == 0
    described = device.load("pixel-8")
    apart = cost.predict([yes, no, yes], described).latency_ms
    together = cost.predict([yes, yes, no], described).latency_ms
    assert apart - together == pytest.approx(roofline.fixed_of(described).delegate_call / 1e3)


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
    assert (
        f"memory bandwidth unknown: assumes the phone default of {DEFAULT_BANDWIDTH_GB_S['phone']:g} GB/s"
        in predicted.note
    )
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


def test_what_the_backend_folds_into_a_layer_costs_nothing() -> None:
    def named(name: str, kind: Kind, delegated: bool = True) -> Operator:
        return operator(kind, delegated=delegated).model_copy(update={"operator": f"aten.{name}.default"})

    conv, norm, clamp = named("conv2d", "conv"), named("batch_norm", "normalization"), named("relu6", "elementwise")
    add = named("add", "elementwise")
    assert cost.drop_folded_operators([conv, norm, clamp, add]) == (conv, add)
    assert cost.drop_folded_operators([conv, add, clamp]) == (conv, add, clamp)  # a sum takes no clamp of ours
    left = named("batch_norm", "normalization", delegated=False)
    assert cost.drop_folded_operators([conv, left, clamp]) == (conv, left, clamp)
    described = device.load("pixel-8")
    assert cost.predict([conv, norm, clamp], described).latency_ms == cost.predict([conv], described).latency_ms


def test_senseless_programs_are_refused() -> None:
    described = device.load("pixel-8")
    with pytest.raises(EdgetuneError, match="no operators"):
        cost.predict([], described)
    with pytest.raises(EdgetuneError, match="cannot be negative"):
        cost.predict([operator(macs=-1)], described)
    with pytest.raises(EdgetuneError, match="plan_bytes"):
        cost.predict([operator()], described, plan_bytes=-1)
    with pytest.raises(EdgetuneError, match="larger than any program"):
        cost.predict([operator(macs=10**400)], described)


def test_priors_against_the_published_rows() -> None:
    """MobileNetV2 on a Pi 4 by XNNPACK: 46 ms. A factor of two is all that priors promise."""
    predicted = cost.predict(NETWORKS["mobilenet-v2"](), device.load("raspberry-pi-4"))
    assert 46 / 2 < predicted.latency_ms < 46 * 2
    assert predicted.latency_low_ms < 46 < predicted.latency_high_ms
    # prefill of Llama 3.2 1B on a OnePlus 12: 60.3 tokens/s in bf16, 260.5 with 8da4w, at 128 tokens
    described, tokens, macs = device.load("oneplus-12"), 128, 128 * 973_146_112
    for dtype, published in (("bf16", 60.3), ("8da4w", 260.5)):
        program = [operator(dtype=dtype, macs=macs, weights=10**9)]  # type: ignore[arg-type]
        assert tokens / (cost.predict(program, described).latency_ms / 1e3) == pytest.approx(published, rel=0.25)


def test_a_prediction_is_the_larger_of_compute_and_memory_time() -> None:
    described = device.load("raspberry-pi-5")
    rates, fixed = rates_of(described), roofline.fixed_of(described)
    for macs, weights, bound in ((10**9, 1000, "compute"), (1000, 10**8, "memory"), (10, 10, "overhead")):
        one = operator(macs=macs, weights=weights, activations=1000)
        (part,) = roofline.operator_costs([one], described)
        shares = roofline.prior_shares("linear", "fp32", delegated=True)
        cached = roofline.weights_fit_in_cache([one], rates)
        computing = roofline.compute_us(one, rates) / shares.compute
        moving = roofline.memory_us(one, rates, cached) / shares.memory
        assert part.us == pytest.approx(max(computing, moving) + fixed.delegated)
        assert part.bound == bound


def test_what_a_cache_holds_moves_faster() -> None:
    rates = rates_of(device.load("raspberry-pi-5"))
    fits, spills = operator(weights=1000, activations=0), operator(weights=int(rates.cache_bytes), activations=0)
    assert roofline.weights_fit_in_cache([fits], rates)
    assert not roofline.weights_fit_in_cache([spills], rates)
    assert not roofline.weights_fit_in_cache(
        [fits] * int(rates.cache_bytes / 1000), rates
    )  # all of the program's count
    far, near = (roofline.memory_us(fits, rates, cached) for cached in (False, True))
    assert far == pytest.approx(near * CACHE_RATIO)
    assert far == pytest.approx(1000 / (rates.memory_gb_s * 1e3))


def test_priors_differ_by_kind_type_and_who_runs_it() -> None:
    for kind in KINDS:
        for dtype in DTYPES:
            taken, left = (roofline.prior_shares(kind, dtype, delegated) for delegated in (True, False))
            assert 0 < left.compute < taken.compute < 1
            assert 0 < left.memory < taken.memory < 1
            assert left.compute_log > taken.compute_log > 0
    conv, depthwise = (roofline.prior_shares(kind, "fp32", delegated=True) for kind in ("conv", "depthwise-conv"))
    assert conv.compute > depthwise.compute
    assert (
        roofline.prior_shares("linear", "int8", delegated=True).compute
        < roofline.prior_shares("linear", "fp32", True).compute
    )


def test_fixed_costs_follow_the_clock() -> None:
    slow, fast = roofline.fixed_of(device.load("raspberry-pi-4")), roofline.fixed_of(device.load("galaxy-s24"))
    assert slow.call > fast.call
    assert slow.call / fast.call == pytest.approx(slow.portable / fast.portable)


def test_uncalibrated_predictions_never_fall_as_sizes_grow() -> None:
    described = device.load("pixel-8")
    for kind in KINDS:
        for dtype in DTYPES:
            for delegated in (True, False):
                for name in ("macs", "weights", "activations"):
                    # the 0 of macs is another operator: one that multiplies nothing
                    grown = [{"macs": 10, "weights": 10, "activations": 16, name: 10**n} for n in range(2, 13)]
                    times = [
                        cost.predict([operator(kind, dtype, delegated=delegated, **sizes)], described).latency_ms
                        for sizes in grown
                    ]
                    assert times == sorted(times), (kind, dtype, name)
