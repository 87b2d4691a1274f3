"""What each layer of a program is predicted to take on a device, and what bounds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgetune.core.ledger import Layer, Layers, Predicted, Roof
from edgetune.core.numbers import aligned, number, percent
from edgetune.profile.calls import operators_of, predicted_calls
from edgetune.profile.cost import parts_of, predict
from edgetune.profile.device import Device, load
from edgetune.profile.part import Bound, Part
from edgetune.profile.rates import CACHE_RATIO, rates_of
from edgetune.program.operators import DType

if TYPE_CHECKING:
    from edgetune.program.artifact import Artifact

MOST = 30
OTHER, CALLS, NO_MODULE = "other", "calls", "(no module)"


def layers(artifact: Artifact, device: str | Device, *, most: int = MOST) -> tuple[Layers, ...]:
    """The layers of each kind of call, in the order of `predicted_calls`, whose latency they add up to."""
    described = device if isinstance(device, Device) else load(device)
    by_call = []
    for prediction, call in zip(predicted_calls(artifact, described), artifact.manifest.calls, strict=True):
        operators = operators_of(call, described.calibration is not None)
        bare_ms = predict(operators, described, plan_bytes=call.plan_bytes, delegate_calls=call.delegates).latency_ms
        slower = prediction.latency_ms / bare_ms  # what published measurements add
        by_call.append(_of_call(prediction, parts_of(operators, described), slower, described, most))
    return tuple(by_call)


def _of_call(call: Predicted, parts: Sequence[Part], slower: float, device: Device, most: int) -> Layers:
    modules: dict[str, list[Part]] = {}
    for part in parts:
        modules.setdefault(part.operator.module or NO_MODULE, []).append(part)
    summed = [_summed(name, of, slower, call.latency_ms) for name, of in modules.items()]
    summed.sort(key=lambda layer: -layer.ms)
    names = {layer.module for layer in summed[most:]}
    rest = [part for name, of in modules.items() if name in names for part in of]
    rates = rates_of(device)
    calls_ms = max(call.latency_ms - slower * sum(part.us for part in parts) / 1e3, 0.0)
    bounds: dict[Bound, float] = {"compute": 0.0, "memory": 0.0, "overhead": 100 * calls_ms / call.latency_ms}
    for part in parts:
        bounds[part.bound] += 100 * slower * part.us / 1e3 / call.latency_ms
    dtypes = sorted({part.operator.dtype for part in parts if part.operator.macs and part.operator.delegated})
    return Layers(
        device=call.device,
        call=call.call,
        latency_ms=call.latency_ms,
        layers=tuple(summed[:most]),
        other=_summed(OTHER, rest, slower, call.latency_ms) if rest else None,
        calls_ms=calls_ms,
        bounds_pct=bounds,
        roof=Roof(
            memory_gb_s=rates.memory_gb_s,
            cache_gb_s=rates.memory_gb_s * CACHE_RATIO,
            gmacs={dtype: rates.threads_gmacs * rates.speedup("linear", dtype) for dtype in dtypes},
        ),
    )


def _summed(name: str, parts: Sequence[Part], slower: float, total_ms: float) -> Layer:
    us = slower * sum(part.us for part in parts)
    bounds: dict[Bound, float] = {}
    dtypes: dict[DType, float] = {}
    for part in parts:
        bounds[part.bound] = bounds.get(part.bound, 0.0) + part.us
        dtypes[part.operator.dtype] = dtypes.get(part.operator.dtype, 0.0) + part.us
    full_us = sum(max(part.compute_us, part.memory_us) for part in parts)
    return Layer(
        module=name,
        operators=len(parts),
        ms=us / 1e3,
        share_pct=100 * us / 1e3 / total_ms,
        bound=max(bounds, key=lambda bound: bounds[bound]),
        utilization_pct=100 * min(full_us / us, 1.0),
        macs=sum(part.operator.macs for part in parts),
        moved_bytes=sum(part.operator.weight_bytes + part.operator.activation_bytes for part in parts),
        dtype=max(dtypes, key=lambda dtype: dtypes[dtype]),
    )


def text(found: Layers) -> str:
    """The layers as a table for a terminal."""
    head = ("module", "ms", "share %", "bound", "used %", "MAC/byte", "GMAC/s", "type")
    rows: list[tuple[str, ...]] = [
        (
            layer.module,
            number(layer.ms),
            percent(layer.share_pct),
            layer.bound,
            percent(layer.utilization_pct),
            number(layer.intensity),
            number(layer.gmacs),
            layer.dtype,
        )
        for layer in (*found.layers, *([found.other] if found.other else []))
    ]
    share = 100 * found.calls_ms / found.latency_ms
    rows.append((CALLS, number(found.calls_ms), percent(share), "overhead", "-", "-", "-", "-"))
    first = f"predicted by layer: {found.where}, {number(found.latency_ms)} ms"
    return "\n".join([first, *aligned((head, *rows), right={1, 2, 4, 5, 6})])
