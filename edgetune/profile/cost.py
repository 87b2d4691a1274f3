"""Predicted cost of a program on a described device: a roofline per operator, plus fixed costs.

    time = max(work / (peak x compute share), bytes / (bandwidth x memory share)) + fixed cost of the operator

The shares come from a calibration where the descriptor has one, else from the priors below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgetune.ledger import Predicted
from edgetune.profile.device import Device
from edgetune.profile.operators import DType, Kind, Operator
from edgetune.profile.rates import CACHE_RATIO, Rates, rates_of
from edgetune.technique import EdgetuneError

MIB = 1024.0 * 1024.0
_LAYERS: frozenset[Kind] = frozenset({"conv", "pointwise-conv", "depthwise-conv", "linear"})
_CLAMPS = (".relu", "hardtanh", ".clamp")

# Share of the peak that a delegated operator reaches without any calibration: (float, 8-bit activations).
# linear: OnePlus 12, Llama 3.2 1B, prefill 117 GOPS in bf16 of 259 peak, 507 of 2074 with 8da4w (executorch's
# llama README). Convolutions: set so that MobileNetV2 on a Raspberry Pi 4 (XNNPACK README, 46 ms) and ResNet-50
# there (ncnn README, 263 ms) fall well inside the band; int8 scaled as for linear. The rest: guesses, and it shows
# in the band.
_COMPUTE: dict[Kind, tuple[float, float]] = {
    "conv": (0.50, 0.30),
    "pointwise-conv": (0.40, 0.25),
    "depthwise-conv": (0.10, 0.10),
    "linear": (0.45, 0.25),
    "matmul": (0.30, 0.20),
    "embedding": (0.20, 0.20),
    "normalization": (0.10, 0.10),
    "softmax": (0.10, 0.10),
    "elementwise": (0.15, 0.15),
    "reduction": (0.10, 0.10),
    "pooling": (0.10, 0.10),
    "data-movement": (0.20, 0.20),
    "other": (0.05, 0.05),
}
_MEMORY = 0.55  # eta of language models on phones without calibration (devices/published.yaml)
# A portable kernel is one thread of plain loops: a small CNN took 65 ms against 3 ms delegated.
_PORTABLE_COMPUTE, _PORTABLE_MEMORY = 0.03, 0.15

# Arithmetic per element for what multiplies nothing, in multiply-accumulates. Orders of magnitude only.
_WORK: dict[Kind, float] = {"softmax": 8.0, "normalization": 6.0, "elementwise": 2.0, "pooling": 2.0, "other": 4.0}
_COSTLY = ("gelu", "tanh", "sigmoid", "exp", "erf", "silu", "log", "pow", "sqrt")
_COSTLY_WORK = 12.0
_ELEMENT_BYTES: dict[DType, float] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "8da4w": 4}

# Natural logarithms of how far off the shares may be. Two labs differ by up to 22 % on one phone.
PRIOR_LOG, PORTABLE_LOG, FALLBACK_LOG, FLOOR_LOG = math.log(1.7), math.log(2.5), math.log(3.0), math.log(1.22)

_MOST = 10**18  # beyond it, sizes are mistakes and sums might overflow

RUNTIME_MIB = 2.0  # code, thread stacks and tables, beyond an empty process


@dataclass(frozen=True)
class Fixed:
    """Costs that do not depend on size, in microseconds."""

    call: float
    delegate_call: float
    delegated: float
    portable: float


# At 2.5 GHz; scaled by the clock. A server core took 3.6 us for a call and under 0.1 us for an operator too small to
# share among threads; a phone's cores are slower to wake, so the delegated cost here is mostly that of the threads.
_FIXED = Fixed(call=10.0, delegate_call=3.0, delegated=2.0, portable=0.5)
_FIXED_GHZ = 2.5


@dataclass(frozen=True)
class Shares:
    """Compute and memory share of one kind of operator, and how unsure they are."""

    compute: float
    memory: float
    compute_log: float
    memory_log: float
    named: str = ""  # says where the guess came from, if it is one on a calibrated device


def work_of(operator: Operator) -> float:
    """Multiply-accumulates, or their like for operators that multiply nothing."""
    if operator.macs > 0:
        return float(operator.macs)
    name = operator.operator.lower()
    per_element = _COSTLY_WORK if any(word in name for word in _COSTLY) else _WORK.get(operator.kind, 1.0)
    if operator.kind in ("softmax", "normalization"):
        per_element = _WORK[operator.kind]
    return per_element * operator.activation_bytes / _ELEMENT_BYTES[operator.dtype]


def compute_us(operator: Operator, rates: Rates) -> float:
    """Microseconds of arithmetic at the full peak rate."""
    peak = rates.threads_gmacs if operator.delegated else rates.core_gmacs
    faster = rates.speedup(operator.kind, operator.dtype) if operator.delegated else 1.0
    return work_of(operator) / (peak * faster * 1e3)


def memory_us(operator: Operator, rates: Rates, weights_cached: bool) -> float:
    """Microseconds of memory traffic at the full bandwidth; what fits into half the last cache is faster."""
    weights = float(operator.weight_bytes)
    activations = float(operator.activation_bytes)
    weights /= CACHE_RATIO if weights_cached else 1.0
    activations /= CACHE_RATIO if activations <= rates.cache_bytes / 2 else 1.0
    return (weights + activations) / (rates.memory_gb_s * 1e3)


def weights_cached(operators: Sequence[Operator], rates: Rates) -> bool:
    """Whether all weights of the program stay in the last cache from one run to the next."""
    return sum(operator.weight_bytes for operator in operators) <= rates.cache_bytes / 2


def prior(kind: Kind, dtype: DType, delegated: bool) -> Shares:
    """The shares assumed without calibration."""
    if not delegated:
        return Shares(_PORTABLE_COMPUTE, _PORTABLE_MEMORY, PORTABLE_LOG, PORTABLE_LOG)
    compute = _COMPUTE[kind][0 if dtype in ("fp32", "fp16", "bf16") else 1]
    return Shares(compute, _MEMORY, PRIOR_LOG, PRIOR_LOG)


def shares_of(operator: Operator, device: Device) -> Shares:
    """The calibrated shares of the operator's kind and type, else the prior with a name and a wider band."""
    calibration = device.calibration
    guess = prior(operator.kind, operator.dtype, operator.delegated)
    if calibration is None:
        return guess
    for found in calibration.efficiencies:
        if (found.kind, found.dtype, found.delegated) == (operator.kind, operator.dtype, operator.delegated):
            error_pct = calibration.error_p90_pct if found.error_pct is None else found.error_pct
            log = max(math.log1p(error_pct / 100), FLOOR_LOG)
            return Shares(
                found.compute,
                found.memory,
                log if found.compute_told else FALLBACK_LOG,
                log if found.memory_told else FALLBACK_LOG,
            )
    by = "delegated" if operator.delegated else "portable"
    return Shares(guess.compute, guess.memory, FALLBACK_LOG, FALLBACK_LOG, f"{by} {operator.dtype} {operator.kind}")


def fixed_of(device: Device) -> Fixed:
    """Fixed costs: calibrated, or the prior scaled by the fastest clock."""
    calibration = device.calibration
    if calibration is not None:
        return Fixed(
            call=calibration.call_us,
            delegate_call=calibration.delegate_call_us,
            delegated=calibration.delegated_operator_us,
            portable=calibration.portable_operator_us,
        )
    scale = _FIXED_GHZ / (device.clusters[0].ghz.value or _FIXED_GHZ)
    return Fixed(_FIXED.call * scale, _FIXED.delegate_call * scale, _FIXED.delegated * scale, _FIXED.portable * scale)


def delegate_calls_of(operators: Sequence[Operator]) -> int:
    """Runs of delegated operators in program order: each is at least one call of the backend."""
    before = [False, *(operator.delegated for operator in operators)]
    return sum(1 for last, operator in zip(before, operators, strict=False) if operator.delegated and not last)


def unfolded(operators: Sequence[Operator]) -> tuple[Operator, ...]:
    """The operators that run on their own: XNNPACK folds a batch norm, and a clamp after it, into the layer before.

    A batch norm that follows no layer is never delegated, so a delegated one is always folded.
    """
    kept: list[Operator] = []
    after_layer = False
    for operator in operators:
        name = operator.operator.lower()
        norm = operator.delegated and "batch_norm" in name
        clamp = operator.delegated and after_layer and any(word in name for word in _CLAMPS)
        if not (norm or clamp):
            kept.append(operator)
            after_layer = operator.delegated and operator.kind in _LAYERS
    return tuple(kept)


def predict(
    operators: Sequence[Operator],
    device: Device,
    *,
    plan_bytes: int = 0,
    program_bytes: int | None = None,
    delegate_calls: int | None = None,
) -> Predicted:
    """Latency with its band, and peak memory above an empty process, of one execution.

    `plan_bytes`: the planned arena; `program_bytes`: size of the `.pte`, by default the sum of the weights;
    `delegate_calls`: by default counted from the order of the operators. Raises `EdgetuneError` for an empty program
    and for negative sizes.
    """
    _check(operators, plan_bytes, program_bytes, delegate_calls)
    operators = unfolded(operators)
    rates, fixed = rates_of(device), fixed_of(device)
    calls = delegate_calls_of(operators) if delegate_calls is None else delegate_calls
    cached = weights_cached(operators, rates)
    total_us = fixed.call + calls * fixed.delegate_call
    weighted_log = total_us * PRIOR_LOG  # each part's uncertainty weighted by its time
    guessed: dict[str, float] = {}
    for operator in operators:
        shares = shares_of(operator, device)
        computing = compute_us(operator, rates) / shares.compute
        # a share above 1 is what a nearer cache gave to small programs: weights from main memory see none of it
        moving = memory_us(operator, rates, cached) / (shares.memory if cached else min(shares.memory, 1.0))
        own_us = max(computing, moving) + (fixed.delegated if operator.delegated else fixed.portable)
        rate_log = rates.compute_log if computing >= moving else rates.memory_log
        if device.calibration is not None:
            rate_log = 0.0  # the shares were fitted with these very rates: their errors cancel
        share_log = shares.compute_log if computing >= moving else shares.memory_log
        weighted_log += own_us * math.hypot(share_log, rate_log, rates.isa_log(operator.kind, operator.dtype))
        total_us += own_us
        if shares.named:
            guessed[shares.named] = guessed.get(shares.named, 0.0) + own_us
    band = math.exp(weighted_log / total_us)
    return Predicted(
        device=device.id,
        latency_ms=total_us / 1e3,
        latency_low_ms=total_us / 1e3 / band,
        latency_high_ms=total_us / 1e3 * band,
        peak_memory_mib=peak_memory_mib(operators, plan_bytes, program_bytes),
        calibrated=device.calibration is not None,
        note=_note(device, rates, guessed, total_us, peak_memory_mib(operators, plan_bytes, program_bytes)),
    )


def peak_memory_mib(operators: Sequence[Operator], plan_bytes: int = 0, program_bytes: int | None = None) -> float:
    """Planned arena + the program's touched pages + the backend's packed weights and workspace + the runtime itself.

    The program is mapped: rows of an embedding that are never read take no memory. The workspace, which no file
    states, is taken as the inputs and outputs of the largest delegated operator.
    """
    weights = sum(operator.weight_bytes for operator in operators)
    touched = weights if program_bytes is None else min(weights, program_bytes)
    packed = sum(operator.weight_bytes for operator in operators if operator.delegated)
    workspace = max((o.activation_bytes for o in operators if o.delegated), default=0)
    return (plan_bytes + touched + packed + workspace) / MIB + RUNTIME_MIB


def train_memory_mib(
    *, weights_mib: float, gradients_mib: float, optimizer_state_mib: float, kept_activations_mib: float
) -> float:
    """Memory of one training step: the sum of what the ledger measured. Raises for a negative or infinite part."""
    parts = {
        "weights_mib": weights_mib,
        "gradients_mib": gradients_mib,
        "optimizer_state_mib": optimizer_state_mib,
        "kept_activations_mib": kept_activations_mib,
    }
    for name, value in parts.items():
        if not (math.isfinite(value) and value >= 0):
            raise EdgetuneError(f"{name} must be finite and not negative", got=value)
    return sum(parts.values())


def _check(
    operators: Sequence[Operator], plan_bytes: int, program_bytes: int | None, delegate_calls: int | None
) -> None:
    if not operators:
        raise EdgetuneError("a program without operators has no cost to predict", action="export the model again")
    sizes = {"plan_bytes": plan_bytes, "program_bytes": program_bytes or 0, "delegate_calls": delegate_calls or 0}
    for name, size in sizes.items():
        if size < 0:
            raise EdgetuneError(f"{name} is negative", got=size)
    for operator in operators:
        if min(operator.macs, operator.weight_bytes, operator.activation_bytes) < 0:
            raise EdgetuneError("an operator's macs and bytes cannot be negative", where=operator.operator)
        if max(operator.macs, operator.weight_bytes, operator.activation_bytes) > _MOST:
            raise EdgetuneError("an operator's macs or bytes are larger than any program's", where=operator.operator)


def _note(device: Device, rates: Rates, guessed: dict[str, float], total_us: float, memory_mib: float) -> str:
    calibration = device.calibration
    if calibration is None:
        parts = ["not calibrated: priors for its class of cores", *rates.notes]
    else:
        parts = [f"calibrated {calibration.date}, error left out one by one {calibration.error_pct:.0f} % (median)"]
    for name, own_us in sorted(guessed.items(), key=lambda item: -item[1])[:4]:
        parts.append(f"{name} was never calibrated: a guess for {100 * own_us / total_us:.0f} % of the time")
    usable, ram = device.memory.usable_app_memory_mib.value, device.memory.ram_gib.value
    if usable is not None and memory_mib > usable:
        parts.append(f"needs {memory_mib:.0f} MiB, more than the {usable:.0f} MiB an app gets")
    elif ram is not None and memory_mib > ram * 1024:
        parts.append(f"needs {memory_mib:.0f} MiB, more than the {ram:g} GiB fitted")
    return "; ".join(parts)
