"""Measurements, predictions and the budget, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from edgetune.core.ledger import NO_MODULE, Ledger, Measured, Predicted, on_cpu
from edgetune.core.numbers import format_number, format_percent, pluralize
from edgetune.recipe.names import HOST
from edgetune.report.tables import Cell, Column, Table, cells, group_notes

CPU_TARGETS = ("xnnpack", "portable")  # what the predictor's rates are of
SLOWEST = 10  # layers in the table
QUANTITIES = {
    "latency_ms": ("latency", "ms"),
    "size_mib": ("program size", "MiB"),
    "train_memory_mib": ("training memory", "MiB"),
    "peak_memory_mib": ("peak memory", "MiB"),
}


def ran_on(ledger: Ledger, line: Measured) -> str:
    """What a program was timed on: `CPU, 2 threads`, or the backend where that is no CPU's."""
    target = ledger.program.target if ledger.program else ""
    return on_cpu(line.threads) if target in ("", *CPU_TARGETS) else on_cpu(line.threads).replace("CPU", target)


def measured_table(ledger: Ledger) -> Table | None:
    """Timed runs of the program."""
    if not ledger.measured:
        return None
    columns = (
        Column("device", text=True),
        Column("runs on", text=True),
        Column("latency, median", "ms", short="median\nms"),
        Column("p10 to p90", "ms", short="p10 to p90\nms"),
        Column("load", "ms"),
        Column("peak memory", "MiB", short="peak\nMiB"),
        Column("runs"),
    )
    rows = tuple(
        cells(
            line.where,
            ran_on(ledger, line),
            format_number(line.latency_ms),
            f"{format_number(line.latency_p10_ms)} to {format_number(line.latency_p90_ms)}",
            format_number(line.load_ms),
            format_number(line.peak_memory_mib),
            f"{line.runs:,}",
        )
        for line in ledger.measured
    )
    notes: tuple[str, ...] = ("Peak memory is that of the process, less that of an empty process.",)
    notes += tuple(f"{line.where}: {line.note}" for line in ledger.measured if line.note)
    return Table("measured", "Measured", columns, rows, notes)


def slowest_table(ledger: Ledger) -> Table | None:
    """The layers that took the longest here, and what bounds them by the prediction for this host or another device."""
    measured = next((line for line in ledger.measured if line.layers_ms), None)
    if measured is None:
        return None
    of_call = [layers for layers in ledger.layers if layers.call == measured.call]
    predicted = next((layers for layers in of_call if layers.device == HOST), of_call[0] if of_call else None)
    here = predicted is not None and predicted.device == HOST
    by_module = {layer.module: layer for layer in predicted.layers} if predicted is not None else {}
    columns = (
        Column("module", text=True),
        Column("measured", "ms"),
        Column("share", "%"),
        *((Column("predicted", "ms"),) if here else ()),
        *((Column("bound by", text=True),) if predicted is not None else ()),
    )
    total_ms = sum(measured.layers_ms.values())
    slowest = sorted(measured.layers_ms.items(), key=lambda item: -item[1])[:SLOWEST]
    rows = []
    for name, ms in slowest:
        layer = by_module.get(name or NO_MODULE)
        texts = [name or NO_MODULE, format_number(ms), format_percent(100 * ms / total_ms)]
        texts += [format_number(layer.ms if layer else None)] if here else []
        texts += [layer.bound if layer else "-"] if predicted is not None else []
        rows.append(cells(*texts))
    parts = f"{measured.where}, {on_cpu(measured.threads)}; {pluralize(len(measured.layers_ms), 'module')}, "
    notes = [f"{parts}{format_number(total_ms)} ms together, recorded operator by operator."]
    if predicted is not None:
        notes.append(f"What bounds a layer is predicted for {predicted.where}.")
    return Table("slowest", "Slowest layers", columns, tuple(rows), tuple(notes))


def predicted_table(ledger: Ledger, *, brief: bool = False) -> Table | None:
    """Predictions from device descriptors; `brief`: each part of the notes only once. Nothing here was timed."""
    if not ledger.predicted:
        return None
    accelerators = any(line.not_predicted for line in ledger.predicted)
    columns = (
        Column("device", text=True),
        Column("runs on", text=True, narrow=7),
        Column("latency", "ms"),
        Column("interval", "ms"),
        Column("peak memory", "MiB", short="peak\nMiB"),
        Column("calibrated", text=True, short="cali-\nbrated"),
        *((Column("accelerator", text=True, short="not pre-\ndicted", narrow=9),) if accelerators else ()),
    )
    rows = tuple(
        (
            *cells(
                line.where,
                line.runs_on,
                format_number(line.latency_ms),
                interval(line),
                format_number(line.peak_memory_mib),
                "yes" if line.calibrated else "no",
            ),
            *((_accelerator_cell(line),) if accelerators else ()),
        )
        for line in ledger.predicted
    )
    notes = ["Computed from device descriptors for the CPU; nothing here was timed."]
    notes += _split_notes(ledger.predicted) if brief else group_notes((x.where, x.note) for x in ledger.predicted)
    return Table("predicted", "Predicted, not measured", columns, rows, tuple(notes))


def _accelerator_cell(line: Predicted) -> Cell:
    kinds = ", ".join(kind.upper() for kind in line.accelerators or ())
    return Cell(line.not_predicted or "none", short=kinds)


def _split_notes(predicted: Sequence[Predicted]) -> list[str]:
    """Each part of a note once, with the devices that it holds for, or `all`."""
    parts = [(line.where, part) for line in predicted for part in line.note.split("; ")]
    everywhere = ", ".join(dict.fromkeys(line.where for line in predicted))
    notes = group_notes(parts)
    return [f"all{note.removeprefix(everywhere)}" if "," in everywhere and note.startswith(f"{everywhere}:") else note
            for note in notes]  # fmt: skip


def interval(line: Predicted) -> str:
    """The interval that the latency is expected in."""
    return f"{format_number(line.latency_low_ms)} to {format_number(line.latency_high_ms)}"


def budget_met(ledger: Ledger) -> bool:
    """Whether there is a budget, and all of it is met."""
    return bool(ledger.verdicts) and all(line.holds for line in ledger.verdicts)


def verdict_table(ledger: Ledger) -> Table | None:
    """The budget, line by line, with the verdict where a narrow screen shows it."""
    if not ledger.verdicts:
        return None
    columns = (
        Column("budget", text=True),
        Column("verdict", text=True),
        Column("device", text=True),
        Column("limit"),
        Column("this run"),
        Column("lowest reachable", short="lowest\nreachable"),
    )
    rows = tuple(
        (
            Cell(", ".join(QUANTITIES[line.quantity])),
            Cell("met", "good") if line.holds else Cell("missed", "bad"),
            *cells(line.device, format_number(line.limit), format_number(line.value), format_number(line.least)),
        )
        for line in ledger.verdicts
    )
    notes = tuple(f"{QUANTITIES[line.quantity][0]}: {line.note}" for line in ledger.verdicts if line.note)
    return Table("budget", "Budget of the recipe", columns, rows, notes)
