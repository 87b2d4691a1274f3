"""Predicted time of each layer of a program on a device, and what bounds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edgetune.core.ledger import Layer, Layers, Predicted, Roof
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
OTHER, CALLS, NO_MODULE = "other", "calls", "(no module)"


def predict_layers(
    artifact: Artifact, device: str | Device, *, measured: Sequence[Mapping[str, float]] = (), most: int = MOST
) -> tuple[Layers, ...]:
    """The layers of each kind of call, in the order of `predict_calls`; their times add up to its latency.

    `measured`: of each kind of call the milliseconds by module that were measured on the device (`measure_layers`);
    they decide which layers are the slowest.
    """
    described = device if isinstance(device, Device) else load(device)
    by_call = []
    calls = artifact.manifest.calls
    times = measured or (None,) * len(calls)
    for prediction, call, times_ms in zip(predict_calls(artifact, described), calls, times, strict=True):
        operators = operators_of(call, described.calibration is not None)
        bare_ms = predict(operators, described, plan_bytes=call.plan_bytes, delegate_calls=call.delegates).latency_ms
        slower = prediction.latency_ms / bare_ms  # factor from published measurements
        costs = operator_costs(operators, described)
        by_call.append(_layers_of_call(prediction, costs, slower, described, most, times_ms))
    return tuple(by_call)


def _layers_of_call(
    call: Predicted,
    costs: Sequence[OperatorCost],
    slower: float,
    device: Device,
    most: int,
    times_ms: Mapping[str, float] | None,
) -> Layers:
    modules: dict[str, list[OperatorCost]] = {}
    for cost in costs:
        modules.setdefault(cost.operator.module or NO_MODULE, []).append(cost)
    summed = [_sum_layer(name, of, slower, call.latency_ms, times_ms) for name, of in modules.items()]
    summed.sort(key=lambda layer: -(layer.measured_ms if layer.measured_ms is not None else layer.ms))
    names = {layer.module for layer in summed[most:]}
    rest = [cost for name, of in modules.items() if name in names for cost in of]
    rest_ms = None if times_ms is None else {OTHER: sum(layer.measured_ms or 0.0 for layer in summed[most:])}
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
        other=_sum_layer(OTHER, rest, slower, call.latency_ms, rest_ms) if rest else None,
        calls_ms=calls_ms,
        measured_ms=None if times_ms is None else sum(times_ms.values()),
        bounds_pct=bounds,
        roof=Roof(
            memory_gb_s=rates.memory_gb_s,
            cache_gb_s=rates.memory_gb_s * CACHE_RATIO,
            gmacs={dtype: rates.threads_gmacs * rates.speedup("linear", dtype) for dtype in dtypes},
        ),
    )


def _sum_layer(
    name: str, costs: Sequence[OperatorCost], slower: float, total_ms: float, times_ms: Mapping[str, float] | None
) -> Layer:
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
        measured_ms=None if times_ms is None else times_ms.get("" if name == NO_MODULE else name, 0.0),
    )


def text(layers: Layers) -> str:
    """The layers as a table for a terminal."""
    timed = layers.measured_ms is not None
    head = ("module", "ms", *(["measured"] if timed else []), "share %", "bound", "used %", "MAC/byte", "GMAC/s", "type")
    rows: list[tuple[str, ...]] = [
        (
            layer.module,
            format_number(layer.ms),
            *([format_number(layer.measured_ms)] if timed else []),
            format_percent(layer.share_pct),
            layer.bound,
            format_percent(layer.utilization_pct),
            format_number(layer.intensity),
            format_number(layer.gmacs),
            layer.dtype,
        )
        for layer in (*layers.layers, *([layers.other] if layers.other else []))
    ]
    share = format_percent(100 * layers.calls_ms / layers.latency_ms)
    rest = ("overhead", "-", "-", "-", "-")
    rows.append((CALLS, format_number(layers.calls_ms), *(["-"] if timed else []), share, *rest))
    first = f"predicted by layer: {layers.where}, {format_number(layers.latency_ms)} ms"
    if timed:
        first += f"; measured, all layers together: {format_number(layers.measured_ms)} ms"
    left = {0, head.index("bound"), head.index("type")}
    return "\n".join([first, *align_columns((head, *rows), right=set(range(len(head))) - left)])
