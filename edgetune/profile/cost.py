"""Predict the cost of a program on a described device: the sum over its operators, and the overhead of calls.

A calibrated device has fitted curves (`edgetune.profile.curves`); for others the larger of compute and memory time
counts (`edgetune.profile.roofline`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgetune.core.errors import EdgetuneError
from edgetune.core.ledger import Predicted
from edgetune.core.numbers import MIB
from edgetune.profile import curves, energy, roofline
from edgetune.profile.device import Device
from edgetune.profile.memory import peak_memory_mib
from edgetune.profile.operator_cost import OperatorCost
from edgetune.profile.rates import Rates, rates_of
from edgetune.profile.terms import delegate_calls_of, footprint_bytes
from edgetune.program.operators import Kind, Operator

_LAYERS: frozenset[Kind] = frozenset({"conv", "pointwise-conv", "depthwise-conv", "linear"})
_CLAMPS = (".relu", "hardtanh", ".clamp")
_MOST = 10**18  # beyond it, sizes are mistakes and sums might overflow


def drop_folded_operators(operators: Sequence[Operator]) -> tuple[Operator, ...]:
    """The operators without those that XNNPACK folds into the layer before: batch norms, and clamps after it.

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


def operator_costs(operators: Sequence[Operator], device: Device) -> list[OperatorCost]:
    """The cost of each operator, in program order, without those that XNNPACK folds into others."""
    if device.calibration is not None:
        return curves.operator_costs(operators, device, device.calibration)
    return roofline.operator_costs(drop_folded_operators(operators), device)


def predict(
    operators: Sequence[Operator],
    device: Device,
    *,
    plan_bytes: int = 0,
    program_bytes: int | None = None,
    delegate_calls: int | None = None,
) -> Predicted:
    """Latency with its interval, energy, cold start, and peak memory above an empty process, of one execution.

    `plan_bytes`: the planned arena; `program_bytes`: size of the `.pte`, by default the sum of the weights;
    `delegate_calls`: by default counted from the order of the operators. Raises `EdgetuneError` for an empty program
    and for negative sizes.
    """
    _check(operators, plan_bytes, program_bytes, delegate_calls)
    costs, rates = operator_costs(operators, device), rates_of(device)
    calls_us = _calls_us(device, delegate_calls_of(operators) if delegate_calls is None else delegate_calls)
    total_us = calls_us + sum(cost.us for cost in costs)
    if device.calibration is not None:
        log = device.calibration.interval_log(total_us) + sum(cost.us * cost.log for cost in costs) / total_us
    else:
        log = (calls_us * roofline.PRIOR_LOG + sum(cost.us * cost.log for cost in costs)) / total_us
    memory_mib = peak_memory_mib(drop_folded_operators(operators), plan_bytes, program_bytes)
    return Predicted(
        device=device.id,
        name=device.name,
        threads=device.calibration.threads if device.calibration is not None else device.thread_count,
        accelerators=tuple(dict.fromkeys(accelerator.kind for accelerator in device.accelerators)),
        latency_ms=total_us / 1e3,
        latency_low_ms=total_us / 1e3 / math.exp(log),
        latency_high_ms=total_us / 1e3 * math.exp(log),
        interval_pct=device.calibration.interval_pct if device.calibration is not None else None,
        peak_memory_mib=memory_mib,
        energy_mj=energy.program_mj(operators, device, total_us / 1e3),
        cold_start_ms=cold_start_ms(operators, device, program_bytes) + total_us / 1e3,
        calibrated=device.calibration is not None,
        note="; ".join([_note(device, rates, costs, total_us), *fits(device, memory_mib)]),
    )


def _calls_us(device: Device, delegate_calls: int) -> float:
    if device.calibration is not None:
        return device.calibration.call_us + delegate_calls * device.calibration.delegate_call_us
    fixed = roofline.fixed_of(device)
    return fixed.call + delegate_calls * fixed.delegate_call


def cold_start_ms(operators: Sequence[Operator], device: Device, program_bytes: int | None = None) -> float:
    """Milliseconds to read the program from storage, if its speed is known, and to pack the weights."""
    weights = footprint_bytes(operators)
    size = weights if program_bytes is None else float(program_bytes)
    speed = device.storage.read_mb_s.value
    reading_ms = size / (speed * 1e3) if speed else 0.0
    if device.calibration is not None:
        calibration = device.calibration
        return reading_ms + calibration.load_ms + calibration.load_ms_per_mib * weights / MIB
    # each weight is read once and written once, by one thread
    return reading_ms + 2 * weights / (rates_of(device).memory_gb_s * roofline.MEMORY_SHARE * 1e6) + _LOAD_MS


_LOAD_MS = 1.0  # to set up a program; a small one took 0.5 ms on a server core


def _check(
    operators: Sequence[Operator], plan_bytes: int, program_bytes: int | None, delegate_calls: int | None
) -> None:
    if not operators:
        raise EdgetuneError("the program has no operators to predict", action="export the model again")
    sizes = {"plan_bytes": plan_bytes, "program_bytes": program_bytes or 0, "delegate_calls": delegate_calls or 0}
    for name, size in sizes.items():
        if size < 0:
            raise EdgetuneError(f"{name} is negative", got=size)
    for operator in operators:
        if min(operator.macs, operator.weight_bytes, operator.activation_bytes) < 0:
            raise EdgetuneError("an operator's macs and bytes cannot be negative", where=operator.operator)
        if max(operator.macs, operator.weight_bytes, operator.activation_bytes) > _MOST:
            raise EdgetuneError("an operator's macs or bytes are larger than any program's", where=operator.operator)


def _note(device: Device, rates: Rates, costs: Sequence[OperatorCost], total_us: float) -> str:
    calibration = device.calibration
    if calibration is None:
        notes = ["not calibrated: uses priors for its class of cores", *rates.notes]
    else:
        notes = [
            f"calibrated {calibration.date} with {calibration.threads} threads, "
            f"error of networks left out {calibration.error_pct:.0f} % (median)"
        ]
    if device.no_runtime:
        notes.insert(0, f"no runtime is there to run it: {device.no_runtime}")
    guessed: dict[str, float] = {}
    for cost in costs:
        if cost.guessed:
            guessed[cost.guessed] = guessed.get(cost.guessed, 0.0) + cost.us
    for name, own_us in sorted(guessed.items(), key=lambda item: -item[1])[:4]:
        notes.append(f"{name}: a guess for {100 * own_us / total_us:.0f} % of the time")
    return "; ".join(notes)


def fits(device: Device, memory_mib: float) -> list[str]:
    """Why the device has too little memory; empty if it has enough, or if unknown."""
    usable, ram = device.memory.usable_app_memory_mib.value, device.memory.ram_gib.value
    if usable is not None and memory_mib > usable:
        return [f"needs {memory_mib:.0f} MiB, more than the {usable:.0f} MiB an app gets"]
    if ram is not None and memory_mib > ram * 1024:
        return [f"needs {memory_mib:.0f} MiB, more than the {ram:g} GiB fitted"]
    return []
