"""The page of `edgetune inspect`: a program, read from its file, with CSS bars and no script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgetune.core.numbers import format_size, pluralize
from edgetune.program.inspection import Inspection, Method
from edgetune.report.pages import Tile, render

_COLORS = ("#3b82d9", "#d9770f", "#159a86", "#8f6bd1", "#c2410c", "#8a8f98", "#b8a13a")
_MOST_BARS = 40  # of one figure; the rest is one bar more


def page(inspection: Inspection) -> str:
    """The page as text. Everything that comes from the file is escaped."""
    beside = inspection.beside
    return render(
        "inspect.html",
        title=Path(inspection.path).name,
        kind="An ExecuTorch program, read from its file",
        tiles=tuple(_tiles(inspection)),
        inspection=inspection,
        colors=_COLORS,
        methods=[_method(method) for method in inspection.methods],
        constants=[(*constant.name_and_layout, constant.size_bytes) for constant in inspection.constants],
        beside=[*beside.facts(), *beside.versions.items()] if beside is not None else [],
        most=_MOST_BARS,
        size=format_size,
        footer=f"SHA-256 {inspection.sha256}, schema version {inspection.schema_version}",
    )


def _tiles(inspection: Inspection) -> Iterator[Tile]:
    delegates = [delegate for method in inspection.methods for delegate in method.delegates]
    kernels = sum(operator.count for method in inspection.methods for operator in method.operators)
    backends = ", ".join(sorted({delegate.backend for delegate in delegates})) or "no backend"
    arena = max((sum(method.arenas_bytes) for method in inspection.methods), default=0)
    yield Tile("File", format_size(inspection.size_bytes), pluralize(len(inspection.methods), "method"))
    yield Tile("Delegated parts", str(len(delegates)), backends)
    yield Tile("Kernel calls outside", str(kernels), "run on portable kernels")
    yield Tile("Planned memory", format_size(arena), "of the method that needs most")
    if inspection.beside is not None and not inspection.beside.problem:
        holds = inspection.beside.checksum_ok
        yield Tile("Checksum", "ok" if holds else "wrong", "against model.json", "good" if holds else "bad")


def _method(method: Method) -> dict[str, Any]:
    """Its rows, and the bars of its delegates and of its kernel calls."""
    rows = [(f"input {number}", slot) for number, slot in enumerate(method.inputs)]
    rows += [(f"output {number}", slot) for number, slot in enumerate(method.outputs)]
    plan = " + ".join(format_size(arena) for arena in method.arenas_bytes) or "none"
    counts = Counter(delegate.backend for delegate in method.delegates)
    bars = [
        (f"{delegate.backend} {number}", "", delegate.size_bytes) for number, delegate in enumerate(method.delegates)
    ]
    return {
        "name": method.name,
        "rows": [*rows, ("memory plan", plan)],
        "backends": ", ".join(f"{count} for {backend}" for backend, count in counts.most_common()),
        "delegates": sorted(bars, key=lambda bar: -bar[2]),
        "calls": [(operator.name, "", operator.count) for operator in method.operators],
    }
