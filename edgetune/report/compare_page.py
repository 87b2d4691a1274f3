"""The page of `edgetune devices compare`."""

from __future__ import annotations

from pathlib import Path

from edgetune.core.numbers import number, plural
from edgetune.report.compare import Comparison, headed, rows_of
from edgetune.report.document import block, section, write_page
from edgetune.report.pictures import by_device
from edgetune.report.tables import Cell, Column, Table


def page(found: Comparison, path: Path) -> None:
    """Write the comparison as one HTML page that needs nothing else, whole or not at all."""
    drawn = by_device(found)
    columns = (
        Column("device", text=True),
        *(Column(name) for name in headed(found)),
        Column("fits", text=True, wraps=True),
    )
    rows = tuple(
        (*(Cell(text) for text in row[:-1]), Cell(row[-1], "bad" if line.fits is False else ""))
        for row, line in zip(rows_of(found), found.lines, strict=True)
    )
    faults = tuple(f"{name} was left out: {fault}" for name, fault in found.faults)
    table = Table("predicted", "Predicted, not measured", columns, rows, found.notes + faults)
    write_page(
        path,
        drawn,
        title=f"{found.program} on {plural(len(found.lines), 'device')}",
        kind=f"edgetune devices compare · {found.target} · {number(found.size_mib)} MiB",
        said=found.notes,
        main=section("Devices", ("devices",), (), drawn) + block(table),
        footer="All values are predicted from device descriptors. 1 MiB is 1,048,576 bytes.",
    )
