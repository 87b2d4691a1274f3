"""Predicted time of each layer of a program on a device, and what bounds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgetune.core.ledger import NO_MODULE, Layer, Layers, Measured, Predicted, Roof
from edgetune.core.numbers import align_columns, format_number, format_percent
from edgetune.profile.calls import operators_of, predict_calls
from edgetune.profile.cost import operator_costs, predict
from edgetune.profile.device import Device, load
from edgetune.profile.operator_cost import Bound, OperatorCost
from edgetune.profile.rates import CACHE_RATIO, rates_of
from edgetune.program.operators import DType

if TYPE_CHECKING:
    from edgetune.program.artifact import Artifact

MOST = 30
OTHER, CALLS = "other", "calls"


def predict_layers(artifact: Artifact, device: str | Device, *, most: int = MOST) -> tuple[Layers, ...]:
    """The layers of each kind of call, in the order of `predict_calls`; their times add up to its latency."""
    described = device if isinstance(device, Device) else load(device)
    by_call = []
    for prediction, call in zip(predict_calls(artifact, described), artifact.manifest.calls, strict=True):
        operators = operators_of(call, described.calibration is not None)
        bare_ms = predict(operators, described, plan_bytes=call.plan_bytes, delegate_calls=call.delegates).latency_ms
        slower = prediction.latency_ms / bare_ms  # factor from published measurements
        by_call.append(_layers_of_call(prediction, operator_costs(operators, described), slower, described, most))
    return tuple(by_call)


def predicted_layers_ms(artifact: Artifact, device: Device) -> list[dict[str, float]]:
    """For each kind of call the predicted milliseconds of every module, "" for what belongs to none."""
    every = max(len(operators_of(call, True)) for call in artifact.manifest.calls)
    return [{_name(layer): layer.ms for layer in of.layers} for of in predict_layers(artifact, device, most=every)]


def _layers_of_call(call: Predicted, costs: Sequence[OperatorCost], slower: float, device: Device, most: int) -> Layers:
    modules: dict[str, list[OperatorCost]] = {}
    for cost in costs:
        modules.setdefault(cost.operator.module or NO_MODULE, []).append(cost)
    summed = [_sum_layer(name, of, slower, call.latency_ms) for name, of in modules.items()]
    summed.sort(key=lambda layer: -layer.ms)
    names = {layer.module for layer in summed[most:]}
    rest = [cost for name, of in modules.items() if name in names for cost in of]
    rates = rates_of(device)
    calls_ms = max(call.latency_ms - slower * sum(cost.us for cost in costs) / 1e3, 0.0)
    bounds: dict[Bound, float] = {"compute": 0.0, "memory": 0.0, "overhead": 100 * calls_ms / call.latency_ms}
    for cost in costs:
        bounds[cost.bound] += 100 * slower * cost.us / 1e3 / call.latency_ms
    dtypes = sorted({cost.operator.dtype for cost in costs if cost.operator.macs and cost.operator.delegated})
    return Layers(
        device=call.device,
        call=call.call,
        latency_ms=call.latency_ms,
        layers=tuple(summed[:most]),
        other=_sum_layer(OTHER, rest, slower, call.latency_ms) if rest else None,
        calls_ms=calls_ms,
        bounds_pct=bounds,
        roof=Roof(
            memory_gb_s=rates.memory_gb_s,
            cache_gb_s=rates.memory_gb_s * CACHE_RATIO,
            gmacs={dtype: rates.threads_gmacs * rates.speedup("linear", dtype) for dtype in dtypes},
        ),
    )


def _sum_layer(name: str, costs: Sequence[OperatorCost], slower: float, total_ms: float) -> Layer:
    us = slower * sum(cost.us for cost in costs)
    bounds: dict[Bound, float] = {}
    dtypes: dict[DType, float] = {}
    for cost in costs:
        bounds[cost.bound] = bounds.get(cost.bound, 0.0) + cost.us
        dtypes[cost.operator.dtype] = dtypes.get(cost.operator.dtype, 0.0) + cost.us
    full_us = sum(max(cost.compute_us, cost.memory_us) for cost in costs)
    return Layer(
        module=name,
        operators=len(costs),
        ms=us / 1e3,
        share_pct=100 * us / 1e3 / total_ms,
        bound=max(bounds, key=lambda bound: bounds[bound]),
        utilization_pct=100 * min(full_us / us, 1.0),
        macs=sum(cost.operator.macs for cost in costs),
        moved_bytes=sum(cost.operator.weight_bytes + cost.operator.activation_bytes for cost in costs),
        dtype=max(dtypes, key=lambda dtype: dtypes[dtype]),
    )


def text(layers: Layers, measured: Measured | None = None) -> str:
    """The layers as a table for a terminal, with what was `measured` of the same call; then the slowest is on top."""
    times_ms = measured.layers_ms if measured is not None else {}
    extra = ("measured",) if times_ms else ()
    head = ("module", "ms", *extra, "share %", "bound", "used %", "MAC/byte", "GMAC/s", "type")
    timed = [(layer, times_ms.get(_name(layer), 0.0)) for layer in layers.layers]
    timed.sort(key=lambda pair: -pair[1])  # without measurements they stay as they are
    if layers.other is not None:
        shown = {_name(layer) for layer in layers.layers}
        timed.append((layers.other, sum(ms for name, ms in times_ms.items() if name not in shown)))
    rows: list[tuple[str, ...]] = [
        (
            layer.module,
            format_number(layer.ms),
            *(format_number(measured_ms) for _ in extra),
            format_percent(layer.share_pct),
            layer.bound,
            format_percent(layer.utilization_pct),
            format_number(layer.intensity),
            format_number(layer.gmacs),
            layer.dtype,
        )
        for layer, measured_ms in timed
    ]
    share = format_percent(100 * layers.calls_ms / layers.latency_ms)
    rows.append((CALLS, format_number(layers.calls_ms), *("-" for _ in extra), share, "overhead", "-", "-", "-", "-"))
    first = f"predicted by layer: {layers.where}, {format_number(layers.latency_ms)} ms"
    if measured is not None and times_ms:
        first += f"; measured: {measured.device}, {format_number(sum(times_ms.values()))} ms"
    left = {head.index(name) for name in ("module", "bound", "type")}
    return "\n".join([first, *align_columns((head, *rows), right=set(range(len(head))) - left)])


def _name(layer: Layer) -> str:
    return "" if layer.module == NO_MODULE else layer.module


def measured_text(measured: Measured, most: int = MOST) -> str:
    """The measured layers alone as a table for a terminal, the slowest first."""
    slowest = sorted(measured.layers_ms.items(), key=lambda item: -item[1])
    total_ms = sum(measured.layers_ms.values())
    shown = [(name or NO_MODULE, ms) for name, ms in slowest[:most]]
    if slowest[most:]:
        shown.append((OTHER, sum(ms for _, ms in slowest[most:])))
    rows = [(name, format_number(ms), format_percent(100 * ms / total_ms)) for name, ms in shown]
    first = f"measured by layer: {measured.where}, {format_number(total_ms)} ms"
    return "\n".join([first, *align_columns((("module", "ms", "share %"), *rows), right={1, 2})])
