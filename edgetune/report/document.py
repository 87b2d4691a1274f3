"""The ledger as one HTML page that needs nothing else: styles, plots and plotly itself stand in it."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template

import yaml

from edgetune.core.files import write_whole
from edgetune.core.ledger import Ledger
from edgetune.core.numbers import DASH, finite, first_capital, noun, number, percent, plural, score, unit
from edgetune.core.registry import require
from edgetune.report.answer_tables import answer_tables
from edgetune.report.device_tables import QUANTITIES, measured_table, predicted_table, ran_on, verdict_table
from edgetune.report.drawing import Figure
from edgetune.report.figures import figures
from edgetune.report.glossary import explained, glossary
from edgetune.report.layer_figures import rooflines_of
from edgetune.report.sentences import details, headline, main_prediction, remarks, smaller
from edgetune.report.tables import (
    Cell,
    Column,
    Table,
    cells,
    last_quality,
    leftover_table,
    program_table,
    quality_table,
    step_table,
    training_table,
)

PLAIN = ("confusion", "leftovers")  # tables of many columns that a narrow screen shows as they are
MONO = ("SHA-256", "file")  # lines of the program whose value is set in a fixed width


def escaped(text: str) -> str:
    """Text of the ledger as HTML text."""
    return html.escape(text, quote=True)


def page(ledger: Ledger, path: Path) -> None:
    """Write the page to `path`, whole or not at all.

    Raises `EdgetuneError` where plotly is missing.
    """
    drawn = (*figures(ledger), *rooflines_of(ledger, path.parent))
    write_page(
        path,
        drawn,
        title=ledger.recipe,
        kind=f"edgetune run · model {ledger.model} · data {ledger.data} · seed {ledger.seed}",
        said=(headline(ledger),),
        remarks=remarks(ledger),
        main=opening(ledger, drawn) + body(ledger, drawn),
        footer=footer(drawn),
    )


def write_page(
    path: Path,
    drawn: Sequence[Figure],
    *,
    title: str,
    kind: str,
    said: Sequence[str],
    main: str,
    footer: str,
    remarks: Sequence[str] = (),
) -> None:
    """Fill the page with these figures, and HTML for `main`; the rest is text."""
    offline = require("plotly.offline", "the HTML report")
    template = Template(resources.files("edgetune.report").joinpath("page.html").read_text(encoding="utf-8"))
    text = template.substitute(
        title=escaped(f"{title} - edgetune"),
        heading=escaped(title),
        kind=escaped(kind),
        sentences=f'<p class="lead">{escaped(said[0])}</p>\n'
        + "".join(f'<p class="remark">{escaped(line)}</p>\n' for line in remarks)
        + "".join(f"<p>{escaped(line)}</p>\n" for line in said[1:]),
        main=main,
        footer=escaped(footer),
        figures=as_json({figure.key: {"spec": figure.spec, "wide": figure.wide} for figure in drawn}),
        plotly=offline.get_plotlyjs().replace("</script", "<\\/script"),
    )
    write_whole(path, text)


def as_json(value: object) -> str:
    """JSON that may stand in a script element: nothing in it can end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


# What stands where


def opening(ledger: Ledger, drawn: Sequence[Figure]) -> str:
    """The chart of quality against size, the numbers, and the run in sentences."""
    plots = "".join(plot(figure) for figure in drawn if figure.key == "quality-size")
    grid = f'<div class="plots first">\n{plots}</div>\n' if plots else ""
    return grid + tiles(ledger) + "".join(f"<p>{escaped(line)}</p>\n" for line in details(ledger))


def body(ledger: Ledger, drawn: Sequence[Figure]) -> str:
    """Sections with their plots and tables; a section without either is left out."""
    steps = step_table(ledger) if ledger.rows else None
    answers = answer_tables(ledger.answers) if ledger.answers else ()
    parts = [
        section("Budget", (), (verdict_table(ledger),), drawn),
        section("Steps", ("kept",), (steps, quality_table(ledger)), drawn),
        section("Predictions on the test set", (), answers, drawn),
        section("Training", ("loss-",), (training_table(ledger),), drawn),
        section(
            "Devices", ("latency", "memory", "roofline-"), (predicted_table(ledger), measured_table(ledger)), drawn
        ),
        section("Program", ("delegated", "leftovers"), (program_table(ledger), leftover_table(ledger)), drawn),
        section("Environment and recipe", (), (environment_table(ledger),), drawn, recipe(ledger)),
        section("Glossary", (), (), drawn, glossary()),
    ]
    return "\n".join(part for part in parts if part)


def section(
    title: str, keys: Sequence[str], tables: Sequence[Table | None], drawn: Sequence[Figure], more: str = ""
) -> str:
    """A heading, the plots whose key starts with one of `keys`, and the tables that there are."""
    plots = [plot(figure) for figure in drawn if any(figure.key.startswith(key) for key in keys)]
    blocks = [block(table) for table in tables if table is not None]
    if not plots and not blocks and not more:
        return ""
    name = title.lower().replace(" ", "-")
    grid = f'<div class="plots">\n{"".join(plots)}</div>\n' if plots else ""
    content = grid + "\n".join(blocks) + more
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escaped(title)}</h2>\n{content}</section>'


def plot(figure: Figure) -> str:
    """The place of a plot, with its content in words for those who do not see it."""
    told = escaped(f"{figure.title}. {figure.told}.")
    wide = ' class="wide"' if figure.wide else ""
    height = figure.spec["layout"]["height"]
    note = f"<small>{escaped(figure.note)}</small>" if figure.note else ""
    return (
        f"<figure{wide}><figcaption>{escaped(figure.title)}{note}</figcaption>\n"
        f'<div class="plot" id="plot-{figure.key}" role="img" aria-label="{told}" style="min-height:{height}px"></div>'
        "</figure>\n"
    )


def block(table: Table) -> str:
    """A table with caption, headed rows and notes, in a box that scrolls sideways where it must."""
    head = "".join(heading(column) for column in table.columns)
    stacked = ' class="stacked"' if len(table.columns) > 2 and table.key not in PLAIN else ""
    head = f"<thead><tr>{head}</tr></thead>\n" if table.key != "program" else ""
    kind = f' class="of-{table.key}"' if table.key in ("predicted", "measured") else ""
    rows = "\n".join(f"<tr{kind}>{row_cells(table, row)}</tr>" for row in table.rows)
    names = "" if table.key in ("program", "leftovers", "mistakes") else " names"
    notes = "".join(f"<li>{escaped(note)}</li>" for note in table.notes)
    notes = f'<ul class="notes">{notes}</ul>' if notes else ""
    return (
        f'<div class="block{names}" id="table-{table.key}"><div class="scroll" role="region" tabindex="0" '
        f'aria-label="{escaped(table.title)}"><table{stacked}>\n<caption>{escaped(table.title)}</caption>\n'
        f"{head}<tbody>\n{rows}\n</tbody></table></div>{notes}</div>\n"
    )


def heading(column: Column) -> str:
    """A column heading with its unit."""
    of = f" <small>{explained(column.unit)}</small>" if column.unit else ""
    kind = "" if column.text else ' class="n"'
    return f'<th scope="col"{kind}>{explained(column.heading)}{of}</th>'


def row_cells(table: Table, row: Sequence[Cell]) -> str:
    """The cells of a row; the first names it."""
    parts = []
    for place, (column, cell) in enumerate(zip(table.columns, row, strict=True)):
        mono = (
            column.text if table.key == "leftovers" else table.key == "program" and place == 1 and row[0].text in MONO
        )
        kinds = [
            kind
            for kind, on in (
                ("n", not column.text),
                ("text", column.wraps),
                (cell.tone, cell.tone),
                ("mono", mono),
            )
            if on
        ]
        of = f' class="{" ".join(kinds)}"' if kinds else ""
        name = ", ".join(text for text in (column.heading, column.unit) if text)
        if place:
            parts.append(f'<td{of} data-name="{escaped(name)}">{shown(cell, column)}</td>')
        else:
            name = explained(cell.text) if table.key == "program" else shown(cell, column)
            parts.append(f'<th scope="row"{of}>{name}</th>')
    return "".join(parts)


def shown(cell: Cell, column: Column) -> str:
    """The text of a cell, with a real dash and a real minus."""
    if cell.text == DASH:
        return '<span aria-label="not measured">–</span>'
    text = "−" + cell.text[1:] if not column.text and cell.text.startswith("-") else cell.text
    image = f'<img src="{escaped(cell.image)}" alt=""> ' if cell.image else ""
    return image + escaped(text)


def environment_table(ledger: Ledger) -> Table | None:
    """Versions and machine."""
    if not ledger.environment:
        return None
    columns = (Column("name", text=True), Column("value", text=True))
    rows = tuple(cells(name, value) for name, value in ledger.environment.items())
    return Table("environment", "Environment and versions", columns, rows)


def recipe(ledger: Ledger) -> str:
    """The resolved recipe as YAML."""
    settings = ledger.model_dump(mode="json")["settings"]
    if not settings:
        return ""
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=100)
    return f"<details open><summary>Resolved recipe</summary><pre>{escaped(text)}</pre></details>"


def footer(drawn: Sequence[Figure]) -> str:
    """How to tell the two kinds of numbers apart, and where they all are."""
    rooflines = any(figure.key.startswith("roofline-") for figure in drawn)
    return (
        "Predicted values are computed from a device descriptor and drawn in hatched blue. Measured values were timed "
        "on a machine and are drawn in solid orange. Every number on this page is in ledger.json, in the same folder."
    ) + (" The rooflines are computed from the program's manifest." if rooflines else "")


# The numbers at the top


def tiles(ledger: Ledger) -> str:
    """Size, quality, latency and budget, as far as they are known."""
    found = [size_tile(ledger), quality_tile(ledger)]
    if ledger.measured:
        line = ledger.measured[0]
        spread = f"{number(line.latency_p10_ms)} to {number(line.latency_p90_ms)} ms"
        under = f"{line.where} ({ran_on(ledger, line)}), p10 to p90: {spread}"
        found.append(tile("Latency, measured", f"{number(line.latency_ms)} ms", under, "measured"))
    first = main_prediction(ledger)
    if first is not None:
        trust = "calibrated" if first.calibrated else "not calibrated"
        spread = f"{number(first.latency_low_ms)} to {number(first.latency_high_ms)} ms"
        under = f"{first.where} ({first.runs_on}), {trust}, {spread}"
        found.append(tile("Latency, predicted", f"{number(first.latency_ms)} ms", under, "predicted"))
    if ledger.program:
        under = f"of the MACs; {percent(ledger.program.delegated_operators_pct)} % of the operators"
        found.append(tile("Delegated", f"{percent(ledger.program.delegated_macs_pct)} %", under))
    if ledger.verdicts:
        broken = [QUANTITIES[verdict.quantity][0] for verdict in ledger.verdicts if not verdict.holds]
        under = f"too high: {', '.join(broken)}" if broken else plural(len(ledger.verdicts), "limit")
        found.append(tile("Budget", "missed" if broken else "met", under, "bad" if broken else "good", words=True))
    return f'<div class="tiles">\n{"".join(found)}</div>' if any(found) else ""


def size_tile(ledger: Ledger) -> str:
    """The program, or the model where there is none."""
    if not ledger.rows:
        return ""
    loaded = ledger.rows[0].size_mib
    if ledger.program is None:
        return tile(
            "Model in memory", f"{number(ledger.rows[-1].size_mib)} MiB", f"from {number(loaded)} MiB; no program"
        )
    under = f"from {number(loaded)} MiB{smaller(loaded, ledger.program.size_mib)}"
    return tile("Program", f"{number(ledger.program.size_mib)} MiB", under)


def quality_tile(ledger: Ledger) -> str:
    """The last quality, beside the best baseline."""
    result = last_quality(ledger)
    if result is None:
        return ""
    known = sorted(
        (line for line in ledger.baselines if finite(line.value) is not None),
        key=lambda line: line.value,
        reverse=result.higher_is_better,
    )
    under = f"best baseline {score(known[0].value)} ({known[0].name})" if known else plural(result.rows, "test row")
    of = unit(result) and f" {unit(result)}"
    return tile(f"{first_capital(noun(result))}, test set", f"{score(result.value)}{of}", under)


def tile(name: str, value: str, under: str, kind: str = "", *, words: bool = False) -> str:
    """One number with its name above and what it goes by below."""
    classes, big = f"tile {kind}".strip(), "big words" if words else "big"
    return (
        f'<dl class="{classes}"><dt>{explained(name)}</dt><dd class="{big}">{escaped(value)}</dd>'
        f'<dd class="under">{escaped(under)}</dd></dl>\n'
    )
