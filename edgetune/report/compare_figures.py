"""The charts of one program on many devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgetune.core.numbers import format_number, pluralize
from edgetune.report.compare import Comparison, Line
from edgetune.report.device_figures import error_bars
from edgetune.report.drawing import BLUE, GREY, ORANGE, TEAL, Figure, axis, build_spec, category_axis, label, log_range

PURPLE = "#8b5fc7"
_FAMILIES = {"phone": BLUE, "board": TEAL, "jetson": PURPLE, "computer": ORANGE, "microcontroller": GREY}
_ROW_PX = 22


def by_device(comparison: Comparison) -> tuple[Figure, ...]:
    """Latency on each device with its interval; for text generation, of one token and of the first token."""
    if comparison.prefill_tokens is None:
        figures = [_latencies("devices", "Predicted latency of one run", comparison.lines, 0)]
    else:
        first = f"Predicted time to the first token, after a prompt of {pluralize(comparison.prefill_tokens, 'token')}"
        figures = [
            _latencies("devices", "Predicted latency of one token", comparison.lines, 0),
            _latencies("devices-first", first, comparison.lines, 1),
        ]
    return tuple(figure for figure in figures if figure is not None)


def _latencies(key: str, title: str, lines: Sequence[Line], call: int) -> Figure | None:
    drawn = sorted((line for line in lines if line.predicted), key=lambda line: line.predicted[call].latency_ms)
    if not drawn:
        return None
    traces = []
    for family in dict.fromkeys(line.family for line in drawn):
        for fits in (True, False):
            of = [line for line in drawn if line.family == family and (line.fits is not False) == fits]
            if of:
                traces.append(_points(of, call, family, fits))
    ends = [
        end for line in drawn for end in (line.predicted[call].latency_low_ms, line.predicted[call].latency_high_ms)
    ]
    layout = {
        "height": len(drawn) * _ROW_PX + 120,
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"},
        "margin": {"l": 8, "r": 12, "t": 56, "b": 8},
        "xaxis": axis("ms, each with its interval", type="log", range=log_range(ends), dtick=1),
        "yaxis": category_axis(categoryorder="array", categoryarray=[label(line.device) for line in drawn], dtick=1),
    }
    description = ", ".join(
        f"{line.device} {format_number(line.predicted[call].latency_ms)} ms"
        + (" (does not fit)" if line.fits is False else "")
        for line in drawn
    )
    return Figure(key, title, description, build_spec(traces, layout), wide=True)


def _points(lines: Sequence[Line], call: int, family: str, fits: bool) -> dict[str, Any]:
    """The devices of one family that it fits, or does not."""
    calls = [line.predicted[call] for line in lines]
    marks = [
        f"{format_number(one.latency_ms)} ms ({format_number(one.latency_low_ms)} to "
        f"{format_number(one.latency_high_ms)}), predicted<br>"
        f"{format_number(one.peak_memory_mib)} MiB{'' if fits else ': ' + label(line.why, 80)}"
        for line, one in zip(lines, calls, strict=True)
    ]
    color = _FAMILIES.get(family, GREY)
    return {
        "type": "scatter",
        "mode": "markers",
        "name": family if fits else f"{family}, does not fit",
        "x": [one.latency_ms for one in calls],
        "y": [label(line.device) for line in lines],
        "error_x": error_bars([(one.latency_ms, one.latency_low_ms, one.latency_high_ms) for one in calls]),
        "marker": {"color": color, "size": 11, "symbol": "circle" if fits else "x-open", "line": {"width": 2}},
        "hovertext": marks,
        "hovertemplate": "<b>%{y}</b><br>%{hovertext}<extra></extra>",
    }
