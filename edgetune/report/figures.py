"""The plots of the page, as values that plotly draws. Colours of text and grid are left to the page's theme.

Blue and hatched is predicted, orange and filled is measured; no plot shares an axis of values between the two by name:
each panel says which it is.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.ledger import Ledger, Measured, Predicted, Row, Training
from edgetune.registry import require
from edgetune.report.numbers import count, finite, noun, number, percent, score, seconds, unit
from edgetune.report.tables import last_quality, step_name

# Legible on white and on near-black; told apart by most colour-blind people, and by pattern as well.
BLUE, ORANGE, TEAL, GREY = "#3b82d9", "#d9770f", "#159a86", "#8a8f98"
BAR_PX = 34  # height of a horizontal bar with its gap
NEAR = 0.035  # points closer than this share of both ranges get one label
SMOOTH_FROM, WINDOWS = 40, 20  # a loss curve of this many updates also gets a running mean over 1/20 of it


@dataclass(frozen=True)
class Figure:
    """A plot: `spec` is plotly's JSON value, `told` is its content in words."""

    key: str
    title: str
    told: str
    spec: dict[str, Any]
    wide: bool = False


def label(text: str, most: int = 28) -> str:
    """A name as plotly text: its small HTML stays unread, and it is cut where it would push the plot aside."""
    return html.escape(text if len(text) <= most else text[: most - 1] + "…", quote=False)


def built(traces: Sequence[dict[str, Any]], layout: dict[str, Any]) -> dict[str, Any]:
    """Traces and layout through plotly, which refuses any attribute that it does not know."""
    graph = require("plotly.graph_objects", "the HTML report")
    base = {
        "template": graph.layout.Template(),
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "hovermode": "closest",
        "font": {"family": "system-ui, sans-serif", "size": 13},
    }
    figure = graph.Figure(data=list(traces), layout={**base, **layout})
    spec: dict[str, Any] = figure.to_plotly_json()
    spec["layout"].pop("template", None)
    return spec


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title that makes its own room."""
    return {"title": {"text": title, "standoff": 10}, "automargin": True, "zeroline": False, **more}


def figures(ledger: Ledger) -> tuple[Figure, ...]:
    """Every plot that the ledger has numbers for."""
    candidates = [
        quality_against_size(ledger),
        kept_for_backward(ledger),
        *(loss_curve(ledger, training, place) for place, training in enumerate(ledger.trainings)),
        latency(ledger),
        memory(ledger),
        delegated(ledger),
        leftovers(ledger),
    ]
    return tuple(figure for figure in candidates if figure is not None)


# Steps


def quality_against_size(ledger: Ledger) -> Figure | None:
    """One point for each row that has both; rows that fall together share a label."""
    result = last_quality(ledger)
    if result is None:
        return None
    metric = result.metric
    rows = [row for row in ledger.rows if row.quality and row.quality.metric == metric]
    rows = [row for row in rows if finite(row.quality and row.quality.value) is not None and finite(row.size_mib)]
    if not rows:
        return None
    sizes = [row.size_mib for row in rows]
    values = [row.quality.value for row in rows if row.quality]
    points = {
        "type": "scatter",
        "mode": "lines+markers+text",
        "name": "steps",
        "x": sizes,
        "y": values,
        "text": point_labels(rows, sizes, values),
        "textposition": ["bottom center" if row is rows[0] else "top center" for row in rows],
        "cliponaxis": False,
        "line": {"color": BLUE, "width": 1, "dash": "dot"},
        "marker": {"color": BLUE, "size": 11},
        "customdata": [[label(f"{row.index} {row.step}"), label(row.detail, 60)] for row in rows],
        "hovertemplate": "<b>%{customdata[0]}</b><br>%{customdata[1]}<br>%{y:.2f}, %{x:.3s} MiB<extra></extra>",
    }
    y_title = f"{noun(result)}{', %' if unit(result) else ''}, test set"
    layout: dict[str, Any] = {
        "height": 380,
        "xaxis": axis("size in memory, MiB", rangemode="tozero"),
        "yaxis": axis(y_title),
        "margin": {"l": 8, "r": 28, "t": 28, "b": 8},
        "shapes": [],
        "annotations": [],
    }
    for baseline in ledger.baselines:
        if finite(baseline.value) is not None:
            add_line(layout, f"{label(baseline.name, 34)} {score(baseline.value)}", baseline.value)
    told = "; ".join(f"{row.index} {row.step}: {score(v)} at {number(row.size_mib)} MiB"
                     for row, v in zip(rows, values, strict=True))  # fmt: skip
    title = f"{noun(result).capitalize()} against size, step by step"
    return Figure("quality-size", title, told, built([points], layout), wide=True)


def add_line(layout: dict[str, Any], text: str, height: float) -> None:
    """A dashed line across the plot for a baseline, named at its right end."""
    layout["shapes"].append(
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": height, "y1": height,
         "line": {"color": GREY, "width": 1, "dash": "dash"}}
    )  # fmt: skip
    layout["annotations"].append(
        {"xref": "paper", "x": 0, "y": height, "text": text, "showarrow": False, "xanchor": "left", "yanchor": "bottom",
         "font": {"size": 12}}
    )  # fmt: skip


def point_labels(rows: Sequence[Row], sizes: Sequence[float], values: Sequence[float]) -> list[str]:
    """A label for each point, empty where another point close by already carries it."""
    wide, high = (max(sizes) or 1.0), (max(values) - min(values)) or 1.0
    groups: list[list[int]] = []
    for place in range(len(rows)):
        for group in groups:
            first = group[0]
            if abs(sizes[first] - sizes[place]) < NEAR * wide and abs(values[first] - values[place]) < NEAR * high:
                group.append(place)
                break
        else:
            groups.append([place])
    labels = [""] * len(rows)
    for group in groups:
        names = [f"{rows[place].index} {rows[place].step}" for place in group]
        labels[group[0]] = "<br>".join(label(name) for name in names) if len(group) <= 3 else span(rows, group)
    return labels


def span(rows: Sequence[Row], group: Sequence[int]) -> str:
    """First and last of many rows in one place."""
    first, last = rows[group[0]], rows[group[-1]]
    return f"{first.index} {label(first.step)} … {last.index} {label(last.step)}"


def kept_for_backward(ledger: Ledger) -> Figure | None:
    """MiB of activations that one training batch keeps, per step."""
    rows = [row for row in ledger.rows if finite(row.backward_kept_mib) is not None]
    if not rows:
        return None
    bars = horizontal(
        [f"{row.index} {row.step}" for row in rows],
        [finite(row.backward_kept_mib) for row in rows],
        TEAL,
        [f" {number(row.backward_kept_mib)}" for row in rows],
    )
    bars["customdata"] = [[label(row.detail, 60), count(row.trainable_parameters), seconds(row.seconds)] for row in rows]
    bars["hovertemplate"] = "<b>%{y}</b><br>%{customdata[0]}<br>%{customdata[1]} trainable<extra></extra>"
    told = "; ".join(f"{row.index} {row.step}: {number(row.backward_kept_mib)} MiB" for row in rows)
    layout = {
        "height": max(380, height_of(len(rows))),
        "xaxis": axis("MiB", rangemode="tozero", range=[0, room_for_text(bars["x"])]),
        "yaxis": category_axis(),
    }
    return Figure("kept", "Kept for backward by one training batch", told, built([bars], layout))


def loss_curve(ledger: Ledger, training: Training, place: int) -> Figure | None:
    """One training: the loss of each update, its running mean, and the learning rate on an axis of its own."""
    points = training.losses
    if not any(finite(point.loss) is not None for point in points):
        return None
    updates = [point.update for point in points]
    losses = [finite(point.loss) for point in points]
    smooth = running_mean(losses) if len(points) >= SMOOTH_FROM else None
    rate = {
        "type": "scatter", "mode": "lines", "name": "learning rate", "yaxis": "y2", "x": updates,
        "y": [finite(point.learning_rate) for point in points], "line": {"color": GREY, "width": 1, "dash": "dot"},
        "opacity": 0.7, "hovertemplate": "learning rate %{y:.2e}<extra></extra>",
    }  # fmt: skip
    raw = {
        "type": "scatter", "mode": "lines" if len(points) > 1 else "markers", "name": "loss", "x": updates, "y": losses,
        "line": {"color": BLUE, "width": 1 if smooth else 2}, "opacity": 0.45 if smooth else 1,
        "hovertemplate": "update %{x}<br>loss %{y:.4f}<extra></extra>",
    }  # fmt: skip
    traces = [rate, raw]
    if smooth:
        traces.append({
            "type": "scatter", "mode": "lines", "name": "running mean", "x": updates, "y": smooth,
            "line": {"color": BLUE, "width": 2.5}, "hovertemplate": "mean %{y:.4f}<extra></extra>",
        })  # fmt: skip
    layout = {
        "height": 320,
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "reversed"},
        "xaxis": axis("update"),
        "yaxis": axis("loss"),
        "yaxis2": axis("learning rate", overlaying="y", side="right", showgrid=False, tickformat="~e", rangemode="tozero"),
    }
    known = [loss for loss in losses if loss is not None]
    told = f"{len(points)} updates; first loss {number(known[0])}, last {number(known[-1])}, lowest {number(min(known))}"
    if len(known) < len(points):
        told += f"; {len(points) - len(known)} not finite"
    title = f"Loss of {step_name(ledger, training.row)}"
    return Figure(f"loss-{place}", title, told, built(traces, layout))


def running_mean(values: Sequence[float | None]) -> list[float | None]:
    """Mean of the known values in a centred window of a twentieth of the curve."""
    half = max(1, len(values) // (2 * WINDOWS))
    means: list[float | None] = []
    for place in range(len(values)):
        known = [value for value in values[max(0, place - half) : place + half + 1] if value is not None]
        means.append(sum(known) / len(known) if known else None)
    return means


# Devices


def latency(ledger: Ledger) -> Figure | None:
    """Predicted with bands above, measured with p10 and p90 below, each in a panel of its own."""
    predicted = [line for line in ledger.predicted if finite(line.latency_ms) is not None]
    measured = [line for line in ledger.measured if finite(line.latency_ms) is not None]
    above = horizontal(
        [line.device for line in predicted], [line.latency_ms for line in predicted], BLUE,
        [f"{number(line.latency_ms)} ({number(line.latency_low_ms)} to {number(line.latency_high_ms)})"
         for line in predicted], hatched=True,
    )  # fmt: skip
    above["error_x"] = whiskers([(line.latency_ms, line.latency_low_ms, line.latency_high_ms) for line in predicted])
    below = horizontal(
        [line.device for line in measured], [line.latency_ms for line in measured], ORANGE,
        [f"{number(line.latency_ms)} ({number(line.latency_p10_ms)} to {number(line.latency_p90_ms)})"
         for line in measured],
    )  # fmt: skip
    below["error_x"] = whiskers([(line.latency_ms, line.latency_p10_ms, line.latency_p90_ms) for line in measured])
    told = told_devices([(line, line.latency_ms) for line in predicted], [(line, line.latency_ms) for line in measured], "ms")
    return panels("latency", "Latency of one run", "ms", above, below, told,
                  "with its band", "median, p10 to p90")  # fmt: skip


def memory(ledger: Ledger) -> Figure | None:
    """Peak memory, in the same two panels; descriptors give no band for it."""
    predicted = [line for line in ledger.predicted if finite(line.peak_memory_mib) is not None]
    measured = [line for line in ledger.measured if finite(line.peak_memory_mib) is not None]
    above = horizontal([line.device for line in predicted], [line.peak_memory_mib for line in predicted], BLUE,
                       [number(line.peak_memory_mib) for line in predicted], hatched=True)  # fmt: skip
    below = horizontal([line.device for line in measured], [line.peak_memory_mib for line in measured], ORANGE,
                       [number(line.peak_memory_mib) for line in measured])  # fmt: skip
    told = told_devices([(line, line.peak_memory_mib) for line in predicted], [(line, line.peak_memory_mib) for line in measured], "MiB")
    return panels("memory", "Peak memory of one run", "MiB", above, below, told,
                  "no band is given", "of the process, above an empty one")  # fmt: skip


def told_devices(
    predicted: Sequence[tuple[Predicted, float]], measured: Sequence[tuple[Measured, float]], of: str
) -> str:
    """Both panels in words."""
    parts = []
    if predicted:
        parts.append("Predicted: " + ", ".join(f"{line.device} {number(value)} {of}" for line, value in predicted))
    if measured:
        parts.append("Measured: " + ", ".join(f"{line.device} {number(value)} {of}" for line, value in measured))
    return ". ".join(parts)


def panels(
    key: str, title: str, of: str, above: dict[str, Any], below: dict[str, Any], told: str, note_above: str, note_below: str
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
    reach = max(room_for_text(ends(bars)) for bars, _ in shown)
    layout: dict[str, Any] = {
        "height": inner_px + top_px + bottom_px,
        "margin": {"l": 8, "r": 12, "t": top_px, "b": bottom_px},
        "annotations": [],
        "xaxis": axis(of, range=[0, reach], anchor="y2" if len(shown) == 2 else "y"),
    }
    top = 1.0
    for place, (bars, head) in enumerate(shown):
        foot = max(0.0, top - len(bars["x"]) * BAR_PX / inner_px)
        name = "yaxis2" if place else "yaxis"
        bars["yaxis"] = "y2" if place else "y"
        layout[name] = category_axis(domain=[foot, top])
        layout["annotations"].append(
            {"xref": "paper", "yref": "paper", "x": 0, "y": top, "text": head, "showarrow": False, "xanchor": "left",
             "yanchor": "bottom", "yshift": 6}
        )  # fmt: skip
        top = foot - gap_px / inner_px
    return Figure(key, title, told, built([bars for bars, _ in shown], layout))


def ends(bars: dict[str, Any]) -> list[float]:
    """Where each bar ends, band included."""
    if "error_x" not in bars:
        return list(bars["x"])
    return [value + more for value, more in zip(bars["x"], bars["error_x"]["array"], strict=True)]


def whiskers(lines: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    """Error bars from (value, low, high); an end that is not finite, or on the wrong side, has no whisker."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, (finite(high) or value) - value) for value, _, high in lines],
        "arrayminus": [max(0.0, value - (low if finite(low) is not None else value)) for value, low, _ in lines],
        "thickness": 1.6,
        "width": 5,
    }


# Program


def delegated(ledger: Ledger) -> Figure | None:
    """What the backend took, of the MACs and of the operators."""
    program = ledger.program
    if program is None:
        return None
    shares = [("of the operators", program.delegated_operators_pct), ("of the MACs", program.delegated_macs_pct)]
    known = [(name, share) for name, share in shares if finite(share) is not None]
    if not known:
        return None
    names = [name for name, _ in known]
    taken: dict[str, Any] = {
        "type": "bar", "orientation": "h", "name": f"delegated to {label(program.target)}", "y": names,
        "x": [share for _, share in known], "text": [f"{percent(share)} %" for _, share in known],
        "textposition": "inside", "insidetextanchor": "middle", "insidetextfont": {"color": "#ffffff"},
        "marker": {"color": TEAL}, "hovertemplate": "%{y}: %{x:.2f} %<extra>delegated</extra>",
    }  # fmt: skip
    left: dict[str, Any] = {
        "type": "bar", "orientation": "h", "name": "left to portable kernels", "y": names,
        "x": [100 - share for _, share in known],
        "marker": {"color": GREY, "pattern": {"shape": "/", "fillmode": "replace", "fgcolor": GREY, "size": 6}},
        "hovertemplate": "%{y}: %{x:.2f} %<extra>left over</extra>",
    }  # fmt: skip
    layout = {
        "height": 230,
        "barmode": "stack",
        "bargap": 0.35,
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        "xaxis": axis("%", range=[0, 100]),
        "yaxis": axis(""),
    }
    told = ", ".join(f"{percent(share)} % {name}" for name, share in reversed(known)) + f" delegated to {program.target}"
    return Figure("delegated", "Delegated share of the program", told, built([taken, left], layout))


def leftovers(ledger: Ledger) -> Figure | None:
    """How often each operator stayed with the portable kernels, over all modules."""
    if ledger.program is None or not ledger.program.leftovers:
        return None
    totals: dict[str, int] = {}
    for left in ledger.program.leftovers:
        totals[left.operator] = totals.get(left.operator, 0) + left.count
    ordered = sorted(totals.items(), key=lambda item: (-item[1], item[0]))
    bars = horizontal([name for name, _ in ordered], [float(many) for _, many in ordered], GREY,
                      [f" {many}" for _, many in ordered], hatched=True)  # fmt: skip
    layout = {
        "height": max(230, height_of(len(ordered))),
        "xaxis": axis("operators", rangemode="tozero", range=[0, room_for_text(bars["x"])]),
        "yaxis": category_axis(),
    }
    told = ", ".join(f"{name} {many}" for name, many in ordered)
    return Figure("leftovers", "Left over, by operator", told, built([bars], layout))


# Shared


def horizontal(
    names: Sequence[str], values: Sequence[float | None], color: str, texts: Sequence[str], *, hatched: bool = False
) -> dict[str, Any]:
    """Horizontal bars, first on top, each with its number."""
    marker: dict[str, Any] = {"color": color, "line": {"color": color, "width": 1.5}}
    if hatched:
        marker["pattern"] = {"shape": "/", "fillmode": "replace", "fgcolor": color, "size": 7, "solidity": 0.35}
    return {
        "type": "bar",
        "orientation": "h",
        "x": list(values),
        "y": [label(name) for name in names],
        "text": list(texts),
        "textposition": "outside",
        "cliponaxis": False,
        "marker": marker,
        "hovertemplate": "<b>%{y}</b><br>%{text}<extra></extra>",
    }


def category_axis(**more: Any) -> dict[str, Any]:
    """Names down the side, first on top."""
    return {"automargin": True, "autorange": "reversed", "type": "category", "showgrid": False, "ticks": "", **more}


def room_for_text(values: Sequence[float | None]) -> float:
    """The end of an axis that leaves room for the number beside the longest bar."""
    return 1.22 * max((value for value in values if value is not None), default=0.0) or 1.0


def height_of(bars: int) -> int:
    """Pixels for this many horizontal bars, axis included."""
    return bars * BAR_PX + 90
