"""Latency and memory per device. Blue and hatched is predicted, orange and filled is measured.

The two never share a panel: each has its own, with a heading, on one scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from edgetune.core.ledger import Ledger, Measured, Predicted
from edgetune.core.numbers import finite_or_none, format_number
from edgetune.report.drawing import (
    BAR_PX,
    BLUE,
    ORANGE,
    Figure,
    axis,
    build_spec,
    category_axis,
    horizontal,
    room_for_text,
)


def latency(ledger: Ledger) -> Figure | None:
    """Predicted with intervals above, measured with p10 and p90 below, each in a panel of its own."""
    predicted = [line for line in ledger.predicted if finite_or_none(line.latency_ms) is not None]
    measured = [line for line in ledger.measured if finite_or_none(line.latency_ms) is not None]
    above = horizontal(
        [label_of(line) for line in predicted], [line.latency_ms for line in predicted], BLUE,
        [f"{format_number(line.latency_ms)} ({format_number(line.latency_low_ms)} to "
         f"{format_number(line.latency_high_ms)})"
         for line in predicted], hatched=True,
    )  # fmt: skip
    above["error_x"] = error_bars([(line.latency_ms, line.latency_low_ms, line.latency_high_ms) for line in predicted])
    below = horizontal(
        [line.where for line in measured], [line.latency_ms for line in measured], ORANGE,
        [f"{format_number(line.latency_ms)} ({format_number(line.latency_p10_ms)} to "
         f"{format_number(line.latency_p90_ms)})"
         for line in measured],
    )  # fmt: skip
    below["error_x"] = error_bars([(line.latency_ms, line.latency_p10_ms, line.latency_p90_ms) for line in measured])
    description = describe_devices(
        [(line, line.latency_ms) for line in predicted], [(line, line.latency_ms) for line in measured], "ms"
    )
    return panels("latency", "Latency of one run", "ms", above, below, description,
                  "on the CPU, with its interval", "median, p10 to p90")  # fmt: skip


def label_of(line: Predicted) -> str:
    """Device and call, and that it is the CPU: a board with a GPU may be faster than the bar says."""
    return f"{line.device} CPU, {line.call}" if line.call else f"{line.device} CPU"


def memory(ledger: Ledger) -> Figure | None:
    """Peak memory, in the same two panels; descriptors give no interval for it, and every device the same."""
    predicted = [line for line in ledger.predicted if finite_or_none(line.peak_memory_mib) is not None]
    measured = [line for line in ledger.measured if finite_or_none(line.peak_memory_mib) is not None]
    bars = [(line.where, line.peak_memory_mib) for line in predicted]
    if len({format_number(value) for _, value in bars}) == 1 and len(bars) > 1:
        bars = [(f"each of {len(bars)} devices", bars[0][1])]
    above = horizontal([name for name, _ in bars], [value for _, value in bars], BLUE,
                       [format_number(value) for _, value in bars], hatched=True)  # fmt: skip
    below = horizontal([line.where for line in measured], [line.peak_memory_mib for line in measured], ORANGE,
                       [format_number(line.peak_memory_mib) for line in measured])  # fmt: skip
    description = describe_devices(
        [(line, line.peak_memory_mib) for line in predicted], [(line, line.peak_memory_mib) for line in measured], "MiB"
    )
    figure = panels("memory", "Peak memory of one run", "MiB", above, below, description,
                    "weights and planned arena", "of the process, less that of an empty one")  # fmt: skip
    if figure is None or not (predicted and measured):
        return figure
    note = (
        "Predicted: the program's weights and its planned arena, which take the same memory on every device. "
        "Measured: the memory of the process less that of an empty process, including the runtime's buffers."
    )
    return replace(figure, note=note)


def describe_devices(
    predicted: Sequence[tuple[Predicted, float]], measured: Sequence[tuple[Measured, float]], of: str
) -> str:
    """Both panels in words."""
    parts = []
    if predicted:
        devices = ", ".join(f"{line.where} {format_number(value)} {of}" for line, value in predicted)
        parts.append(f"Predicted, on the CPU: {devices}")
    if measured:
        parts.append("Measured: " + ", ".join(f"{line.where} {format_number(value)} {of}" for line, value in measured))
    return ". ".join(parts)


def panels(
    key: str,
    title: str,
    of: str,
    above: dict[str, Any],
    below: dict[str, Any],
    description: str,
    note_above: str,
    note_below: str,
) -> Figure | None:
    """Predicted above measured: two panels over one scale, each with its heading. `None` without any bar."""
    shown = [(bars, head) for bars, head in (
        ({**above, "name": "predicted"}, f"<b>Predicted</b>, {note_above}"),
        ({**below, "name": "measured"}, f"<b>Measured</b>, {note_below}"),
    ) if bars["x"]]  # fmt: skip
    if not shown:
        return None
    top_px, gap_px, bottom_px = 34, 52, 56
    inner_px = sum(len(bars["x"]) for bars, _ in shown) * BAR_PX + gap_px * (len(shown) - 1)
    reach = max(room_for_text(ends(bars)) for bars, _ in shown) * (
        1.25 if any("error_x" in bars for bars, _ in shown) else 1
    )
    layout: dict[str, Any] = {
        "height": inner_px + top_px + bottom_px,
        "margin": {"l": 8, "r": 12, "t": top_px, "b": bottom_px},
        "annotations": [],
        "xaxis": axis(of, range=[0, reach], anchor="y2" if len(shown) == 2 else "y"),
    }
    top = 1.0
    for index, (bars, head) in enumerate(shown):
        foot = max(0.0, top - len(bars["x"]) * BAR_PX / inner_px)
        name = "yaxis2" if index else "yaxis"
        bars["yaxis"] = "y2" if index else "y"
        layout[name] = category_axis(domain=[foot, top])
        layout["annotations"].append(
            {"xref": "paper", "yref": "paper", "x": 0, "y": top, "text": head, "showarrow": False, "xanchor": "left",
             "yanchor": "bottom", "yshift": 6}
        )  # fmt: skip
        top = foot - gap_px / inner_px
    traces = [trace for bars, _ in shown for trace in (bars, texts_beyond(bars))]
    return Figure(key, title, description, build_spec(traces, layout))


def texts_beyond(bars: dict[str, Any]) -> dict[str, Any]:
    """Move the numbers of the bars to the end of bar and error bar."""
    texts, bars["text"] = bars["text"], [""] * len(bars["y"])
    bars["hovertext"] = texts
    return {
        "type": "scatter",
        "mode": "text",
        "name": f"{bars['name']}, in figures",
        "x": ends(bars),
        "y": bars["y"],
        "yaxis": bars["yaxis"],
        "text": [f"  {text}" for text in texts],
        "textposition": "middle right",
        "cliponaxis": False,
        "hoverinfo": "skip",
    }


def ends(bars: dict[str, Any]) -> list[float]:
    """Where each bar ends, its interval included."""
    if "error_x" not in bars:
        return list(bars["x"])
    return [value + more for value, more in zip(bars["x"], bars["error_x"]["array"], strict=True)]


def error_bars(lines: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    """Error bars from (value, low, high); an end that is not finite, or on the wrong side, has none."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, (finite_or_none(high) or value) - value) for value, _, high in lines],
        "arrayminus": [
            max(0.0, value - (low if finite_or_none(low) is not None else value)) for value, low, _ in lines
        ],
        "thickness": 1.6,
        "width": 5,
    }
