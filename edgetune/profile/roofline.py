"""The cost of an operator on a device that was never calibrated: the larger of compute time and memory time.

    time = max(work / (peak x compute share), bytes / (bandwidth x memory share)) + fixed cost of the operator

The shares are priors, the same for all devices; `edgetune.profile.prior` corrects them by published measurements of
similar devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgetune.profile.device import Device
from edgetune.profile.operator_cost import OperatorCost
from edgetune.profile.rates import CACHE_RATIO, Rates, rates_of
from edgetune.program.operators import DType, Kind, Operator

# Share of the peak that a delegated operator reaches without any calibration: (float, 8-bit activations).
# linear: OnePlus 12, Llama 3.2 1B, prefill 117 GOPS in bf16 of 259 peak, 507 of 2074 with 8da4w (executorch's
# llama README). Convolutions: set so that MobileNetV2 on a Raspberry Pi 4 (XNNPACK README, 46 ms) and ResNet-50
# there (ncnn README, 263 ms) fall well inside the interval; int8 scaled as for linear. The rest: guesses, which
# widens the interval.
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
MEMORY_SHARE = 0.55  # eta of language models on phones without calibration (devices/published.yaml)
# Images are read by window, not streamed; chosen on the XNNPACK rows of devices/published.yaml, flat from 0.25 to 0.40.
_IMAGE_MEMORY_SHARE = 0.35
_STREAMED = ("linear", "matmul", "embedding")
# A portable kernel is one thread of plain loops: a small CNN took 65 ms against 3 ms delegated.
_PORTABLE_COMPUTE, _PORTABLE_MEMORY = 0.03, 0.15

# Arithmetic per element for what multiplies nothing, in multiply-accumulates. Orders of magnitude only.
_WORK: dict[Kind, float] = {"softmax": 8.0, "normalization": 6.0, "elementwise": 2.0, "pooling": 2.0, "other": 4.0}
_COSTLY = ("gelu", "tanh", "sigmoid", "exp", "erf", "silu", "log", "pow", "sqrt")
_COSTLY_WORK = 12.0
_ELEMENT_BYTES: dict[DType, float] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "8da4w": 4}

# Uncertainty of the shares, as natural logarithms.
PRIOR_LOG, PORTABLE_LOG = math.log(1.7), math.log(2.5)


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
    """Compute and memory share of one kind of operator, and their uncertainty, as natural logarithms."""

    compute: float
    memory: float
    compute_log: float
    memory_log: float


def work_of(operator: Operator) -> float:
    """Multiply-accumulates, or an equivalent for operators without any."""
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


def weights_fit_in_cache(operators: Sequence[Operator], rates: Rates) -> bool:
    """Whether all weights of the program stay in the last cache from one run to the next."""
    return sum(operator.weight_bytes for operator in operators) <= rates.cache_bytes / 2


def prior_shares(kind: Kind, dtype: DType, delegated: bool) -> Shares:
    """The shares assumed without calibration."""
    if not delegated:
        return Shares(_PORTABLE_COMPUTE, _PORTABLE_MEMORY, PORTABLE_LOG, PORTABLE_LOG)
    compute = _COMPUTE[kind][0 if dtype in ("fp32", "fp16", "bf16") else 1]
    memory = MEMORY_SHARE if kind in _STREAMED else _IMAGE_MEMORY_SHARE
    return Shares(compute, memory, PRIOR_LOG, PRIOR_LOG)


def fixed_of(device: Device) -> Fixed:
    """Fixed costs by the fastest clock."""
    scale = _FIXED_GHZ / (device.clusters[0].ghz.value or _FIXED_GHZ)
    return Fixed(_FIXED.call * scale, _FIXED.delegate_call * scale, _FIXED.delegated * scale, _FIXED.portable * scale)


def operator_costs(operators: Sequence[Operator], device: Device) -> list[OperatorCost]:
    """The cost of each operator."""
    rates, fixed = rates_of(device), fixed_of(device)
    cached = weights_fit_in_cache(operators, rates)
    return [operator_cost(operator, rates, fixed, cached) for operator in operators]


def operator_cost(operator: Operator, rates: Rates, fixed: Fixed, cached: bool) -> OperatorCost:
    """The cost of one operator. `cached`: the weights of the program stay in the last cache."""
    shares = prior_shares(operator.kind, operator.dtype, operator.delegated)
    full_us, traffic_us = compute_us(operator, rates), memory_us(operator, rates, cached)
    computing, moving = full_us / shares.compute, traffic_us / shares.memory
    own_us = fixed.delegated if operator.delegated else fixed.portable
    rate_log = rates.compute_log if computing >= moving else rates.memory_log
    share_log = shares.compute_log if computing >= moving else shares.memory_log
    return OperatorCost(
        operator=operator,
        us=max(computing, moving) + own_us,
        log=math.hypot(share_log, rate_log, rates.isa_log(operator.kind, operator.dtype)),
        compute_us=full_us,
        memory_us=traffic_us,
        fixed_us=own_us,
    )
