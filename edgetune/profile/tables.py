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
Pair = tuple[Predicted, "Measured | None"]


def text(title: str, pairs: Sequence[Pair], width: int = WIDTH) -> str:
    """Each kind of call as one table, under the title and above the notes."""
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None, highlight=False, markup=False, emoji=False)
    console.print(title)
    for predicted, measured in pairs:
        console.print()
        if predicted.call:
            console.print(f"{predicted.call}:")
        console.print(_table(predicted, measured))
    notes = list(dict.fromkeys(note for pair in pairs for note in _notes(*pair)))
    if notes:
        console.print()
    for note in notes:
        console.print(note)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _table(predicted: Predicted, measured: Measured | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("predicted")
    if measured is not None:
        table.add_column("measured")
    for name, *cells in _rows(predicted, measured):
        if any(cell not in ("", "-") for cell in cells):
            table.add_row(name, *cells[: 1 if measured is None else 2])
    return table


def _rows(predicted: Predicted, measured: Measured | None) -> Iterator[tuple[str, str, str]]:
    """A name, the predicted and the measured value, with their units."""
    one = measured
    yield "device", predicted.name or predicted.device, one.device if one else ""
    yield "runs on", predicted.runs_on, on_cpu(one.threads) if one else ""
    yield "", predicted.not_predicted, ""
    yield "latency", f"{format_number(predicted.latency_ms)} ms", f"{format_number(one.latency_ms)} ms" if one else ""
    of = f", {predicted.interval_pct:g} % of programs" if predicted.interval_pct is not None else ""
    low, high = predicted.latency_low_ms, predicted.latency_high_ms
    measured_range = f"{_span(one.latency_p10_ms, one.latency_p90_ms)} ms, 80 % of runs" if one else ""
    yield "interval", f"{_span(low, high)} ms{of}", measured_range
    yield "first run", "", _unit(one.first_ms if one else None, "ms")
    yield "load", "", _unit(one.load_ms if one else None, "ms")
    yield "cold start", _unit(predicted.cold_start_ms, "ms"), ""
    memory_mib = one.peak_memory_mib if one else None
    yield "peak memory", _unit(predicted.peak_memory_mib, "MiB"), _unit(memory_mib, "MiB")
    yield "energy", _unit(predicted.energy_mj, "mJ"), _unit(one.energy_mj if one else None, "mJ")
    yield "calibrated", "yes" if predicted.calibrated else "no", ""
    if one is not None:
        yield "runs", "", f"{one.runs:,}"
        yield "noise", "", _unit(one.noise_pct, "%")
        yield "drift", "", _unit(one.drift_pct, "%")
        yield "temperature", "", f"{_span(*one.temperature_c)} °C" if one.temperature_c else ""
        yield "clock", "", f"{_span(*one.clock_mhz)} MHz" if one.clock_mhz else ""


def _span(low: float, high: float) -> str:
    return f"{format_number(low)} to {format_number(high)}"


def _unit(value: float | None, unit: str) -> str:
    return "" if value is None else f"{format_number(value)} {unit}"


def _notes(predicted: Predicted, measured: Measured | None) -> Iterator[str]:
    if predicted.note:
        yield f"Predicted: {predicted.note}."
    if predicted.energy_mj is not None:
        yield "Energy is predicted to an order of magnitude."
    if measured is None:
        yield "Nothing was measured; --measure times the program on this host."
    elif measured.note:
        yield f"Measured: {measured.note}."
    if measured is not None and measured.energy_note:
        yield f"Energy: {measured.energy_note}."
