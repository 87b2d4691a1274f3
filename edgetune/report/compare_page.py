"""The page of `edgetune devices compare`."""

from __future__ import annotations

from pathlib import Path

from edgetune.core.numbers import format_number, pluralize
from edgetune.report.compare import Comparison, column_headings, rows_of
from edgetune.report.compare_figures import by_device
from edgetune.report.pages import Section, write_report
from edgetune.report.tables import Cell, Column, Table


def page(comparison: Comparison, path: Path) -> None:
    """Write the comparison as one self-contained HTML page, whole or not at all."""
    figures = by_device(comparison)
    columns = (
        Column("device", text=True),
        *(Column(name) for name in column_headings(comparison)),
        Column("fits", text=True, wraps=True),
    )
    rows = tuple(
        (*(Cell(text) for text in row[:-1]), Cell(row[-1], "bad" if line.fits is False else ""))
        for row, line in zip(rows_of(comparison), comparison.lines, strict=True)
    )
    faults = tuple(f"{name} was left out: {fault}" for name, fault in comparison.faults)
    table = Table("predicted", "Predicted, not measured", columns, rows, comparison.notes + faults)
    write_report(
        path,
        figures,
        title=f"{comparison.program} on {pluralize(len(comparison.lines), 'device')}",
        kind=f"edgetune devices compare · {comparison.target} · {format_number(comparison.size_mib)} MiB",
        lead=comparison.notes[0],
        sentences=comparison.notes[1:],
        sections=(Section("Devices", figures, (table,)),),
        footer="All values are predicted from device descriptors. 1 MiB is 1,048,576 bytes.",
    )
