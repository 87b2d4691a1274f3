"""The page of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from edgetune.core.ledger import Ledger
from edgetune.core.numbers import (
    capitalize_first,
    finite_or_none,
    format_number,
    format_percent,
    format_score,
    metric_noun,
    metric_unit,
    pluralize,
)
from edgetune.report.answer_tables import answer_tables
from edgetune.report.device_tables import (
    QUANTITIES,
    measured_table,
    predicted_table,
    ran_on,
    slowest_table,
    verdict_table,
)
from edgetune.report.drawing import Figure
from edgetune.report.figures import figures
from edgetune.report.glossary import TERMS
from edgetune.report.layer_figures import rooflines
from edgetune.report.pages import Section, Tile, write_report
from edgetune.report.sentences import details, headline, main_prediction, remarks, smaller
from edgetune.report.tables import (
    Column,
    Table,
    cells,
    last_quality,
    program_table,
    quality_table,
    step_table,
    training_table,
    undelegated_table,
)
from edgetune.report.width_figures import width_figures, width_tables

FOOTER = (
    "Predicted values are computed from a device descriptor and drawn in hatched blue. Measured values were timed "
    "on a machine and are drawn in solid orange. Every number on this page is in ledger.json, in the same folder."
)


def page(ledger: Ledger, path: Path) -> None:
    """Write the page to `path`, whole or not at all.

    Raises `EdgetuneError` if plotly is missing.
    """
    drawn = (*figures(ledger), *width_figures(ledger), *rooflines(ledger.layers))
    write_report(
        path,
        drawn,
        title=ledger.recipe,
        kind=f"edgetune run · model {ledger.model} · data {ledger.data} · seed {ledger.seed}",
        lead=headline(ledger),
        remarks=remarks(ledger),
        first=_starting_with(drawn, "quality-size"),
        tiles=tuple(tiles(ledger)),
        details=details(ledger),
        sections=sections(ledger, drawn),
        terms=TERMS,
        footer=FOOTER,
    )


def sections(ledger: Ledger, drawn: tuple[Figure, ...]) -> tuple[Section, ...]:
    """The parts of the page below its opening, each with what the ledger has for it."""

    def section(title: str, tables: tuple[Table | None, ...], *keys: str, code: str = "") -> Section:
        return Section(title, _starting_with(drawn, *keys), [table for table in tables if table is not None], code)

    settings = ledger.model_dump(mode="json")["settings"]
    recipe = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=100) if settings else ""
    steps = step_table(ledger) if ledger.rows else None
    devices = (predicted_table(ledger), measured_table(ledger), slowest_table(ledger))
    return (
        section("Budget", (verdict_table(ledger),)),
        section("Steps", (steps, quality_table(ledger)), "saved"),
        section("Precision of the layers", width_tables(ledger), "widths-"),
        section("Predictions on the test set", answer_tables(ledger.answers) if ledger.answers else ()),
        section("Training", (training_table(ledger),), "loss-"),
        section("Devices", devices, "latency", "memory", "roofline-"),
        section("Program", (program_table(ledger), undelegated_table(ledger)), "delegated", "undelegated"),
        section("Environment and recipe", (environment_table(ledger),), code=recipe),
    )


def _starting_with(drawn: tuple[Figure, ...], *keys: str) -> tuple[Figure, ...]:
    return tuple(figure for figure in drawn if figure.key.startswith(keys))


def environment_table(ledger: Ledger) -> Table | None:
    """Versions and machine."""
    if not ledger.environment:
        return None
    columns = (Column("name", text=True), Column("value", text=True))
    rows = tuple(cells(name, value) for name, value in ledger.environment.items())
    return Table("environment", "Environment and versions", columns, rows)


def tiles(ledger: Ledger) -> Iterator[Tile]:
    """Size, quality, latency and budget, as far as they are known."""
    if ledger.rows:
        yield size_tile(ledger)
    yield from quality_tile(ledger)
    if ledger.measured:
        line = ledger.measured[0]
        spread = f"{format_number(line.latency_p10_ms)} to {format_number(line.latency_p90_ms)} ms"
        under = f"{line.where} ({ran_on(ledger, line)}), p10 to p90: {spread}"
        yield Tile("Latency, measured", f"{format_number(line.latency_ms)} ms", under, "measured")
    first = main_prediction(ledger)
    if first is not None:
        trust = "calibrated" if first.calibrated else "not calibrated"
        spread = f"{format_number(first.latency_low_ms)} to {format_number(first.latency_high_ms)} ms"
        under = f"{first.where} ({first.runs_on}), {trust}, {spread}"
        yield Tile("Latency, predicted", f"{format_number(first.latency_ms)} ms", under, "predicted")
    if ledger.program:
        under = f"of the MACs; {format_percent(ledger.program.delegated_operators_pct)} % of the operators"
        yield Tile("Delegated", f"{format_percent(ledger.program.delegated_macs_pct)} %", under)
    if ledger.verdicts:
        broken = [QUANTITIES[verdict.quantity][0] for verdict in ledger.verdicts if not verdict.holds]
        under = f"too high: {', '.join(broken)}" if broken else pluralize(len(ledger.verdicts), "limit")
        yield Tile("Budget", "missed" if broken else "met", under, "bad" if broken else "good", words=True)


def size_tile(ledger: Ledger) -> Tile:
    """The program, or the model where there is none."""
    loaded = ledger.rows[0].size_mib
    if ledger.program is None:
        under = f"from {format_number(loaded)} MiB; no program"
        return Tile("Model in memory", f"{format_number(ledger.rows[-1].size_mib)} MiB", under)
    under = f"from {format_number(loaded)} MiB{smaller(loaded, ledger.program.size_mib)}"
    return Tile("Program", f"{format_number(ledger.program.size_mib)} MiB", under)


def quality_tile(ledger: Ledger) -> Iterator[Tile]:
    """The last quality, beside the best baseline."""
    result = last_quality(ledger)
    if result is None:
        return
    measured = [line for line in ledger.baselines if finite_or_none(line.value) is not None]
    best = sorted(measured, key=lambda line: line.value, reverse=result.higher_is_better)[:1]
    under = [f"best baseline {format_score(line.value)} ({line.name})" for line in best] or [
        pluralize(result.rows, "test row")
    ]
    of = metric_unit(result) and f" {metric_unit(result)}"
    yield Tile(f"{capitalize_first(metric_noun(result))}, test set", f"{format_score(result.value)}{of}", under[0])
