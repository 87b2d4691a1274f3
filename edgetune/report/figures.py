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
    build_spec,
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
        saved_for_backward(ledger),
        *(loss_curve(ledger, training, index) for index, training in enumerate(ledger.trainings)),
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
    points_of_rows = [
        (row, row.quality.value)
        for row in ledger.rows
        if row.quality and row.quality.metric == result.metric
        if finite_or_none(row.quality.value) is not None and finite_or_none(row.size_mib) is not None
    ]
    if not points_of_rows:
        return None
    rows, values = [row for row, _ in points_of_rows], [value for _, value in points_of_rows]
    sizes = [row.size_mib for row in rows]
    points = {
        "type": "scatter",
        "mode": "lines+markers+text",
        "name": "steps",
        "x": sizes,
        "y": values,
        "text": point_labels(rows, sizes, values),
        "textposition": [label_side(values, index) for index in range(len(rows))],
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
        "yaxis": axis(y_title, range=pad_range([*values, *baselines.values()])),
        "margin": {"l": 8, "r": 44, "t": 28 + 20 * len(baselines), "b": 8},
        "shapes": [],
        "annotations": [],
    }
    add_baselines(layout, baselines)
    description = "; ".join(f"{row.index} {row.step}: {format_score(v)} at {format_number(row.size_mib)} MiB"
                     for row, v in zip(rows, values, strict=True))  # fmt: skip
    title = f"{capitalize_first(metric_noun(result))} against size, step by step"
    return Figure("quality-size", title, description, build_spec([points], layout))


def pad_range(values: Sequence[float]) -> list[float]:
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
    for index in range(len(rows)):
        for group in groups:
            first = group[0]
            if abs(sizes[first] - sizes[index]) < NEAR * wide and abs(values[first] - values[index]) < NEAR * high:
                group.append(index)
                break
        else:
            groups.append([index])
    labels = [""] * len(rows)
    for group in groups:
        names = [f"{rows[index].index} {rows[index].step}" for index in group]
        labels[group[0]] = "<br>".join(label(name) for name in names) if len(group) <= 2 else span(rows, group)
    return labels


def label_side(values: Sequence[float], index: int) -> str:
    """Below a local minimum of the path, else above."""
    around = [values[other] for other in (index - 1, index + 1) if 0 <= other < len(values)]
    last = index > 0 and index == len(values) - 1
    low = bool(around) and not last and min(around) >= values[index] and max(values) > values[index]
    return "bottom center" if low else "top center"


def span(rows: Sequence[Row], group: Sequence[int]) -> str:
    """The range of many rows at one point, and the name of the last: "5 to 8 finalize"."""
    first, last = rows[group[0]], rows[group[-1]]
    return f"{first.index} to {last.index} {label(last.step)}"


def saved_for_backward(ledger: Ledger) -> Figure | None:
    """MiB that one training batch saves for backward, per step."""
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
    description = "; ".join(f"{row.index} {row.step}: {format_number(row.saved_for_backward_mib)} MiB" for row in rows)
    layout = {
        "height": max(380, height_of(len(rows))),
        "xaxis": axis("MiB", rangemode="tozero", range=[0, room_for_text(bars["x"])]),
        "yaxis": category_axis(),
    }
    return Figure("saved", "Saved for backward by one training batch", description, build_spec([bars], layout))


def loss_curve(ledger: Ledger, training: Training, index: int) -> Figure | None:
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
    finite = [loss for loss in losses if loss is not None]
    first, last, lowest = (format_number(loss) for loss in (finite[0], finite[-1], min(finite)))
    description = f"{len(points)} updates; first loss {first}, last {last}, lowest {lowest}"
    if len(finite) < len(points):
        description += f"; {len(points) - len(finite)} not finite"
    title = f"Loss of {step_name(ledger, training.row)}"
    return Figure(f"loss-{index}", title, description, build_spec(traces, layout))


def running_mean(values: Sequence[float | None]) -> list[float | None]:
    """Mean of the window values in a centred window of a twentieth of the curve."""
    half = max(1, len(values) // (2 * WINDOWS))
    means: list[float | None] = []
    for index in range(len(values)):
        window = [value for value in values[max(0, index - half) : index + half + 1] if value is not None]
        means.append(sum(window) / len(window) if window else None)
    return means


# Program


def delegated(ledger: Ledger) -> Figure | None:
    """The delegated share of the MACs and of the operators."""
    program = ledger.program
    if program is None:
        return None
    shares = [("of the operators", program.delegated_operators_pct), ("of the MACs", program.delegated_macs_pct)]
    measured = [(name, share) for name, share in shares if finite_or_none(share) is not None]
    if not measured:
        return None
    names = [name for name, _ in measured]
    taken: dict[str, Any] = {
        "type": "bar", "orientation": "h", "name": f"delegated to {label(program.target)}", "y": names,
        "x": [share for _, share in measured], "text": [f"{format_percent(share)} %" for _, share in measured],
        "textposition": "inside", "insidetextanchor": "middle", "insidetextfont": {"color": "#ffffff"},
        "marker": {"color": TEAL}, "hovertemplate": "%{y}: %{x:.2f} %<extra>delegated</extra>",
    }  # fmt: skip
    left: dict[str, Any] = {
        "type": "bar", "orientation": "h", "name": "undelegated", "y": names,
        "x": [100 - share for _, share in measured],
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
    description = (
        ", ".join(f"{format_percent(share)} % {name}" for name, share in reversed(measured))
        + f" delegated to {program.target}"
    )
    return Figure("delegated", "Delegated share of the program", description, build_spec([taken, left], layout))


def undelegated(ledger: Ledger) -> Figure | None:
    """The count of each undelegated operator, over all modules."""
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
    description = ", ".join(f"{name} {many}" for name, many in ordered)
    return Figure("undelegated", "Undelegated operators", description, build_spec([bars], layout))
