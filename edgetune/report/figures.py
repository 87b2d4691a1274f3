"""The plots of the page, as values that plotly draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgetune.core.ledger import Ledger, Row, Training
from edgetune.core.numbers import (
    capitalize_first,
    finite_or_none,
    format_count,
    format_number,
    format_percent,
    format_score,
    format_seconds,
    metric_noun,
    metric_unit,
)
from edgetune.report.device_figures import latency, memory
from edgetune.report.drawing import (
    BLUE,
    GREY,
    TEAL,
    Figure,
    axis,
    built,
    category_axis,
    height_of,
    horizontal,
    label,
    room_for_text,
)
from edgetune.report.tables import last_quality, step_name

NEAR = 0.035  # points closer than this share of both ranges get one label
SMOOTH_FROM, WINDOWS = 40, 20  # a loss curve of this many updates also gets a running mean over 1/20 of it


def figures(ledger: Ledger) -> tuple[Figure, ...]:
    """Every plot that the ledger has numbers for."""
    candidates = [
        quality_against_size(ledger),
        kept_for_backward(ledger),
        *(loss_curve(ledger, training, place) for place, training in enumerate(ledger.trainings)),
        latency(ledger),
        memory(ledger),
        delegated(ledger),
        undelegated(ledger),
    ]
    return tuple(figure for figure in candidates if figure is not None)


# Steps


def quality_against_size(ledger: Ledger) -> Figure | None:
    """One point for each row that has both; rows that fall together share a label."""
    result = last_quality(ledger)
    if result is None:
        return None
    known = [
        (row, row.quality.value)
        for row in ledger.rows
        if row.quality and row.quality.metric == result.metric
        if finite_or_none(row.quality.value) is not None and finite_or_none(row.size_mib) is not None
    ]
    if not known:
        return None
    rows, values = [row for row, _ in known], [value for _, value in known]
    sizes = [row.size_mib for row in rows]
    points = {
        "type": "scatter",
        "mode": "lines+markers+text",
        "name": "steps",
        "x": sizes,
        "y": values,
        "text": point_labels(rows, sizes, values),
        "textposition": [label_side(values, place) for place in range(len(rows))],
        "cliponaxis": False,
        "line": {"color": BLUE, "width": 1, "dash": "dot"},
        "marker": {"color": BLUE, "size": 11},
        "customdata": [[label(f"{row.index} {row.step}"), label(row.detail, 60)] for row in rows],
        "hovertemplate": "<b>%{customdata[0]}</b><br>%{customdata[1]}<br>%{y:.2f}, %{x:.3s} MiB<extra></extra>",
    }
    baselines = {line.name: line.value for line in ledger.baselines if finite_or_none(line.value) is not None}
    y_title = f"{metric_noun(result)}{', %' if metric_unit(result) else ''}, test set"
    layout: dict[str, Any] = {
        "height": 380,
        "xaxis": axis("size in memory, MiB", range=[0, 1.12 * max(sizes)]),
        "yaxis": axis(y_title, range=padded([*values, *baselines.values()])),
        "margin": {"l": 8, "r": 44, "t": 28 + 20 * len(baselines), "b": 8},
        "shapes": [],
        "annotations": [],
    }
    add_baselines(layout, baselines)
    told = "; ".join(f"{row.index} {row.step}: {format_score(v)} at {format_number(row.size_mib)} MiB"
                     for row, v in zip(rows, values, strict=True))  # fmt: skip
    title = f"{capitalize_first(metric_noun(result))} against size, step by step"
    return Figure("quality-size", title, told, built([points], layout))


def padded(values: Sequence[float]) -> list[float]:
    """A range around the values with room for labels at both ends."""
    low, high = min(values), max(values)
    room = 0.16 * (high - low) or max(abs(high) * 0.1, 1.0)
    return [low - room, high + room]


def add_baselines(layout: dict[str, Any], baselines: Mapping[str, float]) -> None:
    """A dashed line across the plot for each baseline, its value at the right end; their names above the plot."""
    common = {"xref": "paper", "showarrow": False, "xanchor": "left", "align": "left", "font": {"size": 12}}
    for value in baselines.values():
        layout["shapes"].append(
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value, "layer": "below",
             "line": {"color": GREY, "width": 1, "dash": "dash"}}
        )  # fmt: skip
        layout["annotations"].append({**common, "x": 1, "y": value, "yanchor": "middle", "text": format_score(value)})
    if baselines:
        names = "<br>".join(f"– – {format_score(value)} {label(name, 34)}" for name, value in baselines.items())
        layout["annotations"].append(
            {**common, "x": 0, "y": 1, "yref": "paper", "yanchor": "bottom", "yshift": 12, "text": names}
        )


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
        labels[group[0]] = "<br>".join(label(name) for name in names) if len(group) <= 2 else span(rows, group)
    return labels


def label_side(values: Sequence[float], place: int) -> str:
    """Below a point that the path comes down to and leaves upwards, else above: off the path."""
    around = [values[other] for other in (place - 1, place + 1) if 0 <= other < len(values)]
    last = place > 0 and place == len(values) - 1
    low = bool(around) and not last and min(around) >= values[place] and max(values) > values[place]
    return "bottom center" if low else "top center"


def span(rows: Sequence[Row], group: Sequence[int]) -> str:
    """Numbers of many rows in one place, and the name of the last: "5 to 8 finalize"."""
    first, last = rows[group[0]], rows[group[-1]]
    return f"{first.index} to {last.index} {label(last.step)}"


def kept_for_backward(ledger: Ledger) -> Figure | None:
    """MiB of activations that one training batch keeps, per step."""
    rows = [row for row in ledger.rows if finite_or_none(row.saved_for_backward_mib) is not None]
    if not rows:
        return None
    bars = horizontal(
        [f"{row.index} {row.step}" for row in rows],
        [finite_or_none(row.saved_for_backward_mib) for row in rows],
        TEAL,
        [f" {format_number(row.saved_for_backward_mib)}" for row in rows],
    )
    bars["customdata"] = [
        [label(row.detail, 60), format_count(row.trainable_parameters), format_seconds(row.seconds)] for row in rows
    ]
    bars["hovertemplate"] = "<b>%{y}</b><br>%{customdata[0]}<br>%{customdata[1]} trainable<extra></extra>"
    told = "; ".join(f"{row.index} {row.step}: {format_number(row.saved_for_backward_mib)} MiB" for row in rows)
    layout = {
        "height": max(380, height_of(len(rows))),
        "xaxis": axis("MiB", rangemode="tozero", range=[0, room_for_text(bars["x"])]),
        "yaxis": category_axis(),
    }
    return Figure("kept", "Saved for backward by one training batch", told, built([bars], layout))


def loss_curve(ledger: Ledger, training: Training, place: int) -> Figure | None:
    """One training: the loss of each update, its running mean, and the learning rate on an axis of its own."""
    points = training.losses
    if not any(finite_or_none(point.loss) is not None for point in points):
        return None
    updates = [point.update for point in points]
    losses = [finite_or_none(point.loss) for point in points]
    smooth = running_mean(losses) if len(points) >= SMOOTH_FROM else None
    rate = {
        "type": "scatter", "mode": "lines", "name": "learning rate", "yaxis": "y2", "x": updates,
        "y": [finite_or_none(point.learning_rate) for point in points],
        "line": {"color": GREY, "width": 1, "dash": "dot"},
        "opacity": 0.7, "hovertemplate": "learning rate %{y:.2e}<extra></extra>",
    }  # fmt: skip
    raw = {
        "type": "scatter", "mode": "lines" if len(points) > 1 else "markers", "name": "loss", "x": updates, "y": losses,
        "line": {"color": BLUE, "width": 1 if smooth else 2}, "opacity": 0.45 if smooth else 1,
        "hovertemplate": "update %{x}<br>loss %{y:.4f}<extra></extra>",
    }  # fmt: skip
    traces: list[dict[str, Any]] = [rate, raw]
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
        "yaxis2": axis(
            "learning rate",
            overlaying="y",
            side="right",
            showgrid=False,
            tickformat=".1e",
            tickmode="auto",
            nticks=5,
            rangemode="tozero",
        ),
    }
    known = [loss for loss in losses if loss is not None]
    first, last, lowest = (format_number(loss) for loss in (known[0], known[-1], min(known)))
    told = f"{len(points)} updates; first loss {first}, last {last}, lowest {lowest}"
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


# Program


def delegated(ledger: Ledger) -> Figure | None:
    """What the backend took, of the MACs and of the operators."""
    program = ledger.program
    if program is None:
        return None
    shares = [("of the operators", program.delegated_operators_pct), ("of the MACs", program.delegated_macs_pct)]
    known = [(name, share) for name, share in shares if finite_or_none(share) is not None]
    if not known:
        return None
    names = [name for name, _ in known]
    taken: dict[str, Any] = {
        "type": "bar", "orientation": "h", "name": f"delegated to {label(program.target)}", "y": names,
        "x": [share for _, share in known], "text": [f"{format_percent(share)} %" for _, share in known],
        "textposition": "inside", "insidetextanchor": "middle", "insidetextfont": {"color": "#ffffff"},
        "marker": {"color": TEAL}, "hovertemplate": "%{y}: %{x:.2f} %<extra>delegated</extra>",
    }  # fmt: skip
    left: dict[str, Any] = {
        "type": "bar", "orientation": "h", "name": "undelegated", "y": names,
        "x": [100 - share for _, share in known],
        "marker": {"color": GREY, "pattern": {"shape": "/", "fillmode": "replace", "fgcolor": GREY, "size": 6}},
        "hovertemplate": "%{y}: %{x:.2f} %<extra>undelegated</extra>",
    }  # fmt: skip
    layout = {
        "height": 230,
        "barmode": "stack",
        "bargap": 0.35,
        "margin": {"l": 8, "r": 24, "t": 12, "b": 8},
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        "xaxis": axis("%", range=[0, 100]),
        "yaxis": axis(""),
    }
    told = (
        ", ".join(f"{format_percent(share)} % {name}" for name, share in reversed(known))
        + f" delegated to {program.target}"
    )
    return Figure("delegated", "Delegated share of the program", told, built([taken, left], layout))


def undelegated(ledger: Ledger) -> Figure | None:
    """How often each operator stayed with the portable kernels, over all modules."""
    if ledger.program is None or not ledger.program.undelegated:
        return None
    totals: dict[str, int] = {}
    for left in ledger.program.undelegated:
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
    return Figure("undelegated", "Undelegated operators", told, built([bars], layout))
