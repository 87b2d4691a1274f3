"""The cost of each kind of call; a text-generation program has two: a token, and a piece of a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgetune.core.ledger import Predicted
from edgetune.profile import prior
from edgetune.profile.cost import predict
from edgetune.profile.device import Device, load
from edgetune.profile.energy import program_mj
from edgetune.profile.memory import peak_memory_mib
from edgetune.program.operators import Operator

if TYPE_CHECKING:
    from edgetune.program.artifact import Artifact
    from edgetune.program.manifest import Call

_ATTENTION = "custom_sdpa"  # executorch's own kernel: blocked products on all threads, no plain loops


def predict_calls(artifact: Artifact, device: str | Device) -> tuple[Predicted, ...]:
    """Predict each kind of call on a device, in the order of the manifest. Memory is the largest of all calls."""
    described = device if isinstance(device, Device) else load(device)
    manifest = artifact.manifest
    calibrated = described.calibration is not None
    predictions = []
    for call in manifest.calls:
        operators = operators_of(call, calibrated)
        prediction = predict(
            operators,
            described,
            plan_bytes=call.plan_bytes,
            program_bytes=manifest.total_bytes,
            delegate_calls=call.delegates,
        )
        memory_mib = peak_memory_mib(
            operators_of(call, True), call.plan_bytes, manifest.total_bytes, call.workspace_bytes
        )
        if not calibrated and manifest.target == "xnnpack":
            prediction = _apply_prior(prediction, operators, described)
        predictions.append(prediction.model_copy(update={"call": call.label, "peak_memory_mib": memory_mib}))
    peak_mib = max(prediction.peak_memory_mib for prediction in predictions)
    return tuple(prediction.model_copy(update={"peak_memory_mib": peak_mib}) for prediction in predictions)


def _apply_prior(prediction: Predicted, operators: Sequence[Operator], device: Device) -> Predicted:
    """Correct a prediction by the prior from published measurements."""
    log, sigma = prior.load_prior().offset(device, prior.group_of(operators))
    latency_ms, width = prediction.latency_ms * math.exp(log), math.exp(prior.SIGMAS * sigma)
    return prediction.model_copy(
        update={
            "latency_ms": latency_ms,
            "latency_low_ms": latency_ms / width,
            "latency_high_ms": latency_ms * width,
            "interval_pct": 100 * prior.COVERAGE,
            "energy_mj": program_mj(operators, device, latency_ms),
            "cold_start_ms": (prediction.cold_start_ms or 0.0) + latency_ms - prediction.latency_ms,
        }
    )


def operators_of(call: Call, as_executed: bool) -> tuple[Operator, ...]:
    """The operators of a call: as in the model, or as executed, if the manifest has them."""
    return tuple(map(_as_matmul, (as_executed and call.executed) or call.operators))


def _as_matmul(operator: Operator) -> Operator:
    """Attention has a kernel of its own that is as fast as a delegated product, so treat it as one."""
    if _ATTENTION not in operator.operator:
        return operator
    return operator.model_copy(update={"delegated": True, "kind": "matmul"})
