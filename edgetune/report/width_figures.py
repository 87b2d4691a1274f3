"""What a choice of precisions for the layers gained: divergence against size, and each layer's share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgetune.core.ledger import Ledger
from edgetune.core.numbers import DASH, finite_or_none, format_number, format_percent
from edgetune.core.widths import BitWidths, MeasuredWidths
from edgetune.report.drawing import BLUE, GREY, Figure, axis, build_spec, label, log_range
from edgetune.report.tables import Cell, Column, Table, cells

LABELS = {"this": "this choice", "uniform": "best uniform", "random": "random"}


def width_figures(ledger: Ledger) -> tuple[Figure, ...]:
    """One for each step that chose precisions and measured others beside its choice."""
    figures = [width_figure(row.widths, f"{row.index} {row.step}", row.index) for row in ledger.rows if row.widths]
    return tuple(figure for figure in figures if figure is not None)


def width_tables(ledger: Ledger) -> tuple[Table, ...]:
    """One for each step that gave layers different precisions."""
    return tuple(width_table(row.widths, f"{row.index} {row.step}") for row in ledger.rows if row.widths)


def width_figure(widths: BitWidths, step: str, index: int = 0) -> Figure | None:
    """KL divergence against size, one point for each choice; choices that fall together share one.

    The axis is logarithmic unless a choice diverges by nothing. `None` if nothing finite was measured.
    """
    points: dict[tuple[float, float], list[MeasuredWidths]] = {}
    for one in widths.measured:
        if finite_or_none(one.kl_divergence) is not None and finite_or_none(one.size_mib) is not None:
            points.setdefault((one.size_mib, one.kl_divergence), []).append(one)
    if not points:
        return None
    sizes, divergences = [size for size, _ in points], [divergence for _, divergence in points]
    logarithmic = min(divergences) > 0
    vertical: dict[str, Any] = (
        {"type": "log", "range": log_range(divergences), "exponentformat": "power"}
        if logarithmic
        else {"range": [0, 1.16 * max(divergences) or 1.0]}
    )
    batches = "held-out batches" if widths.held_out else "the calibration batches"
    layout = {
        "height": 380,
        "xaxis": axis("size of the whole model as stored, MiB", range=[0, 1.25 * max(sizes)]),
        "yaxis": axis(f"KL divergence on {batches}, nats", **vertical),
        "margin": {"l": 8, "r": 60, "t": 36, "b": 8},
    }
    description = "; ".join(
        f"{label_points(ones)}: {format_number(divergence)} nats at {format_number(size)} MiB"
        for (size, divergence), ones in points.items()
    )
    note = (
        "Lower and further left is better. Best uniform and random: of at most the size of this choice. All weights "
        "are rounded to nearest, and no labels are used, so this is not the quality on the test set."
    )
    title = f"Divergence against size: the precisions that {step} chose, and others"
    return Figure(f"widths-{index}", title, description, build_spec([_points(points)], layout), note=note)


def label_points(ones: Sequence[MeasuredWidths]) -> str:
    """The names of choices that are one point."""
    return ", ".join(LABELS.get(one.name, one.name) for one in ones)


def _points(points: dict[tuple[float, float], list[MeasuredWidths]]) -> dict[str, Any]:
    is_this = [any(one.name == "this" for one in ones) for ones in points.values()]
    names = ["<br>".join(label(LABELS.get(one.name, one.name)) for one in ones) for ones in points.values()]
    return {
        "type": "scatter",
        "mode": "markers+text",
        "x": [size for size, _ in points],
        "y": [divergence for _, divergence in points],
        "text": names,
        "textposition": ["bottom center" if this else "top center" for this in is_this],
        "cliponaxis": False,
        "marker": {
            "color": [BLUE if this else GREY for this in is_this],
            "symbol": ["diamond" if this else "circle" for this in is_this],
            "size": [14 if this else 10 for this in is_this],
        },
        "customdata": [[f"{ones[0].average_bits:.2f}"] for ones in points.values()],
        "hovertemplate": "<b>%{text}</b><br>%{customdata[0]} bits on average<br>%{y:.3g} nats, %{x:.3s} MiB"
        "<extra></extra>",
    }


def width_table(widths: BitWidths, step: str) -> Table:
    """Width, stored bits, predicted loss and share of the size of each layer, in the model's order."""
    columns = (
        Column("layer", text=True),
        Column("width", text=True),
        Column("bits of a weight"),
        Column("predicted loss"),
        Column("share of the size", "%"),
    )
    rows = [
        cells(one.layer, one.width, format_number(one.bits), format_number(one.loss), format_percent(one.share_pct))
        for one in widths.layers
    ]
    rest = 100 - sum(one.share_pct for one in widths.layers)
    rows.append((Cell("all else", "faint"), *cells(DASH, DASH, DASH, format_percent(max(rest, 0.0)))))
    notes = ["Bits as stored, scales included."]
    if widths.loss:
        notes.append(f"Predicted loss: {widths.loss}, of this layer alone.")
    if any(one.bits is None for one in widths.layers):
        notes.append(f"{DASH} bits: the values are those of another layer, and only the scales are stored.")
    return Table("widths", f"Precision of the layers after {step}", columns, tuple(rows), tuple(notes))
