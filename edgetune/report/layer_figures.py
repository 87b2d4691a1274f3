"""The rooflines of a program's layers, each kind of call on each device that it was predicted for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgetune.core.ledger import Layer, Layers
from edgetune.core.numbers import format_number, format_percent, pluralize
from edgetune.report.drawing import BLUE, GREY, ORANGE, Figure, axis, build_spec, label, log_range

_BOUNDS = {"compute": BLUE, "memory": ORANGE, "overhead": GREY}
_FEWEST_PX, _MOST_PX = 7.0, 34.0  # of a point, across


def rooflines(calls: Sequence[Layers]) -> tuple[Figure, ...]:
    """One for each kind of call on each device: the rates of its calls below the device's limits."""
    figures = [roofline(call, index) for index, call in enumerate(calls)]
    return tuple(figure for figure in figures if figure is not None)


def roofline(call: Layers, index: int = 0) -> Figure | None:
    """Intensity against the rate reached, one point per layer; `None` if nothing multiplies."""
    drawn = [layer for layer in call.layers if layer.macs]
    if not drawn:
        return None
    roof = call.roof
    left = 0.5 * min(layer.intensity for layer in drawn)
    ridge = max(roof.gmacs.values(), default=0.0) / roof.memory_gb_s
    right = 2.0 * max(*(layer.intensity for layer in drawn), ridge)
    slopes = [("memory", roof.memory_gb_s, "solid"), ("last cache", roof.cache_gb_s, "dot")]
    top = max(roof.gmacs.values(), default=max(layer.gmacs for layer in drawn))
    traces = [_line_of(f"{name}, {format_number(gb_s)} GB/s", [left, min(top / gb_s, right)],
                       [left * gb_s, min(top, right * gb_s)], dash) for name, gb_s, dash in slopes]  # fmt: skip
    for dtype, gmacs in roof.gmacs.items():
        start = min(max(left, gmacs / roof.cache_gb_s), right)
        traces.append(_line_of(f"{dtype}, {format_number(gmacs)} GMAC/s", [start, right], [gmacs, gmacs], "dash"))
    for bound, color in _BOUNDS.items():
        of = [layer for layer in drawn if layer.bound == bound]
        if of:
            traces.append(_layers_of(of, bound, color))
    heights = [layer.gmacs for layer in drawn] + [left * roof.memory_gb_s, top]
    layout = {
        "height": 440,
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "itemsizing": "constant"},
        "margin": {"l": 8, "r": 12, "t": 70, "b": 8},
        "xaxis": axis("multiply-accumulates per byte", type="log", range=log_range([left, right]), dtick=1),
        "yaxis": axis("GMAC/s reached, predicted", type="log", range=log_range(heights), dtick=1),
    }
    title = f"Roofline of the CPU, predicted: {call.where}"
    return Figure(f"roofline-{index}", title, _describe(call, len(drawn)), build_spec(traces, layout))


def _describe(call: Layers, drawn: int) -> str:
    """The chart in words."""
    bounds = ", ".join(f"{bound} {format_percent(share)} %" for bound, share in call.bounds_pct.items())
    slowest = call.layers[0]
    return (
        f"Of the predicted time, bound by {bounds}. The slowest layer is {slowest.module} with "
        f"{format_percent(slowest.share_pct)} %, {format_number(slowest.intensity)} multiply-accumulates per byte and "
        f"{format_number(slowest.gmacs)} GMAC/s. {pluralize(drawn, 'layer')} drawn, sized by time; layers without "
        "multiplications are not shown. Points above the memory slope are served by a cache"
    )


def _line_of(name: str, x: Sequence[float], y: Sequence[float], dash: str) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines", "name": name, "x": list(x), "y": list(y),
        "line": {"color": GREY, "width": 1.5, "dash": dash}, "hoverinfo": "name",
    }  # fmt: skip


def _layers_of(layers: Sequence[Layer], bound: str, color: str) -> dict[str, Any]:
    """The layers with one bound; area stands for time."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": f"bound by {bound}",
        "x": [layer.intensity for layer in layers],
        "y": [layer.gmacs for layer in layers],
        "marker": {
            "color": color,
            "opacity": 0.75,
            "size": [max(_FEWEST_PX, _MOST_PX * (layer.share_pct / 100) ** 0.5) for layer in layers],
            "line": {"width": 1, "color": color},
        },
        "hovertext": [
            f"<b>{label(layer.module, 60)}</b><br>{format_number(layer.ms)} ms, "
            f"{format_percent(layer.share_pct)} % of the time<br>"
            f"{format_percent(layer.utilization_pct)} % of what bounds it, {layer.dtype}"
            for layer in layers
        ],
        "hovertemplate": "%{hovertext}<br>%{x:.3s} MAC/byte, %{y:.3s} GMAC/s<extra></extra>",
    }
