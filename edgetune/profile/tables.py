"""The cost of a program as tables for a terminal: predicted and measured side by side, never mixed."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from edgetune.core.ledger import Measured, Predicted, on_cpu
from edgetune.core.numbers import format_number

WIDTH = 80
Pair = tuple["Predicted | None", "Measured | None"]
_NAMES = (
    "device", "runs on", "", "latency", "interval", "first run", "load", "cold start", "peak memory", "energy",
    "calibrated", "runs", "noise", "drift", "temperature", "clock",
)  # fmt: skip


def text(title: str, pairs: Sequence[Pair], width: int = WIDTH) -> str:
    """Each kind of call as one table, under the title and above the notes; each is predicted, measured or both."""
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None, highlight=False, markup=False, emoji=False)
    console.print(title)
    for pair in pairs:
        console.print()
        call = next((of.call for of in pair if of is not None), "")
        if call:
            console.print(f"{call}:")
        console.print(_table(*pair))
    notes = list(dict.fromkeys(note for pair in pairs for note in _notes(*pair)))
    if notes:
        console.print()
    for note in notes:
        console.print(note)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _table(predicted: Predicted | None, measured: Measured | None) -> Table:
    columns: dict[str, dict[str, str]] = {}
    if predicted is not None:
        columns["predicted"] = _predicted_cells(predicted)
    if measured is not None:
        columns["measured"] = _measured_cells(measured)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("", *columns):
        table.add_column(head)
    for name in _NAMES:
        cells = [column.get(name, "") for column in columns.values()]
        if any(cell not in ("", "-") for cell in cells):
            table.add_row(name, *cells)
    return table


def _predicted_cells(predicted: Predicted) -> dict[str, str]:
    """The values with their units, by name."""
    of = f", {predicted.interval_pct:g} % of programs" if predicted.interval_pct is not None else ""
    return {
        "device": predicted.name or predicted.device,
        "runs on": predicted.runs_on,
        "": predicted.not_predicted,
        "latency": f"{format_number(predicted.latency_ms)} ms",
        "interval": f"{_span(predicted.latency_low_ms, predicted.latency_high_ms)} ms{of}",
        "cold start": _unit(predicted.cold_start_ms, "ms"),
        "peak memory": _unit(predicted.peak_memory_mib, "MiB"),
        "energy": _unit(predicted.energy_mj, "mJ"),
        "calibrated": "yes" if predicted.calibrated else "no",
    }


def _measured_cells(measured: Measured) -> dict[str, str]:
    return {
        "device": measured.device,
        "runs on": on_cpu(measured.threads),
        "latency": f"{format_number(measured.latency_ms)} ms",
        "interval": f"{_span(measured.latency_p10_ms, measured.latency_p90_ms)} ms, 80 % of runs",
        "first run": _unit(measured.first_ms, "ms"),
        "load": _unit(measured.load_ms, "ms"),
        "peak memory": _unit(measured.peak_memory_mib, "MiB"),
        "energy": _unit(measured.energy_mj, "mJ"),
        "runs": f"{measured.runs:,}",
        "noise": _unit(measured.noise_pct, "%"),
        "drift": _unit(measured.drift_pct, "%"),
        "temperature": f"{_span(*measured.temperature_c)} °C" if measured.temperature_c else "",
        "clock": f"{_span(*measured.clock_mhz)} MHz" if measured.clock_mhz else "",
    }


def _span(low: float, high: float) -> str:
    return f"{format_number(low)} to {format_number(high)}"


def _unit(value: float | None, unit: str) -> str:
    return "" if value is None else f"{format_number(value)} {unit}"


def _notes(predicted: Predicted | None, measured: Measured | None) -> Iterator[str]:
    if predicted is None:
        yield "Nothing is predicted: `edgetune devices calibrate` describes this host; --device names another one."
    elif predicted.note:
        yield f"Predicted: {predicted.note}."
    if predicted is not None and predicted.energy_mj is not None:
        yield "Energy is predicted to an order of magnitude."
    if measured is None:
        yield "Nothing was measured; --measure times the program on this host."
    elif measured.note:
        yield f"Measured: {measured.note}."
    if measured is not None and measured.energy_note:
        yield f"Energy: {measured.energy_note}."
