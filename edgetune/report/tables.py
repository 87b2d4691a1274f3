"""The ledger as tables and sentences: what is said, once, for the terminal and for the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgetune.ledger import Ledger, Predicted, Quality, Row, Verdict
from edgetune.report.numbers import (
    DASH,
    change,
    count,
    finite,
    noun,
    number,
    percent,
    plural,
    quality,
    score,
    seconds,
    unit,
)

Tone = Literal["", "good", "bad", "faint"]


@dataclass(frozen=True)
class Column:
    """`short` is the heading, unit included, where room is short; `room` is the width it takes to show the column."""

    heading: str
    unit: str = ""
    text: bool = False  # left-aligned, may wrap
    short: str = ""
    room: int = 0  # characters


@dataclass(frozen=True)
class Cell:
    """One entry of a table."""

    text: str
    tone: Tone = ""
    image: str = ""  # a data: URI, for the page


@dataclass(frozen=True)
class Table:
    """A caption that stands by itself, columns, rows and what must be said below them."""

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


def cells(*texts: str) -> tuple[Cell, ...]:
    """A row of plain cells."""
    return tuple(Cell(text, "faint" if text == DASH else "") for text in texts)


def last_quality(ledger: Ledger) -> Quality | None:
    """The quality of the last row that has one."""
    return next((row.quality for row in reversed(ledger.rows) if row.quality is not None), None)


def gain(now: Quality | None, before: Quality | None) -> float | None:
    """How much `now` differs from `before`; `None` where either is missing or the metrics differ."""
    if now is None or before is None or now.metric != before.metric:
        return None
    return finite(now.value - before.value)


def best(rows: tuple[Row, ...]) -> Quality | None:
    """The best quality among rows."""
    known = [row.quality for row in rows if row.quality is not None and finite(row.quality.value) is not None]
    if not known:
        return None
    return max(known, key=lambda q: q.value if q.higher_is_better else -q.value)


def change_cell(now: Quality | None, before: Quality | None) -> Cell:
    """A change, toned by whether it is for the better."""
    difference = gain(now, before)
    text = change(difference)
    if now is None or difference is None or text == "0.00":
        return Cell(text, "faint")
    return Cell(text, "good" if (difference > 0) == now.higher_is_better else "bad")


def step_table(ledger: Ledger) -> Table:
    """One row for each step."""
    metric = last_quality(ledger)
    name, of, points = (noun(metric), unit(metric), unit(metric) and "points") if metric else ("quality", "", "")
    short = {"accuracy": "acc.\n%", "perplexity": "perpl."}.get(name, "qual.")
    columns = (
        Column("step", text=True),
        Column("settings", text=True, room=150),
        Column(name, of, short=short),
        Column("since load", points, room=100),
        Column("since best", points, short="since\nbest"),
        Column("parameters", short="params"),
        Column("trainable", short="train-\nable"),
        Column("size", "MiB"),
        Column("MACs"),
        Column("kept for backward", "MiB", short="kept\nMiB"),
        Column("time", "s"),
    )
    rows = tuple(step_row(ledger.rows, place) for place in range(len(ledger.rows)))
    notes = [f"{row.index} {row.step}: {row.note}" for row in ledger.rows if row.note]
    if metric:
        notes.insert(0, f"{noun(metric).capitalize()} on {plural(metric.rows, 'row')} of the test set; "
                     f"{'higher' if metric.higher_is_better else 'lower'} is better.")  # fmt: skip
    if any(not row.note and None in (row.quality, row.macs, row.backward_kept_mib) for row in ledger.rows):
        notes.append(f"{DASH} not measured.")
    return Table("steps", "Step by step", columns, rows, tuple(notes))


def step_row(rows: tuple[Row, ...], place: int) -> tuple[Cell, ...]:
    """The cells of one step."""
    row = rows[place]
    return (
        Cell(f"{row.index} {row.step}"),
        Cell(row.detail, "faint"),
        *cells(score(row.quality.value) if row.quality else DASH),
        change_cell(row.quality, rows[0].quality) if place else Cell(DASH, "faint"),
        change_cell(row.quality, best(rows[:place])),
        *cells(count(row.parameters), count(row.trainable_parameters), number(row.size_mib), count(row.macs)),
        *cells(number(row.backward_kept_mib), seconds(row.seconds)),
    )


def quality_table(ledger: Ledger) -> Table | None:
    """The result beside the baselines, best first."""
    result = last_quality(ledger)
    if result is None or not ledger.baselines:
        return None
    lines = [(baseline.name, baseline.value, False) for baseline in ledger.baselines] + [
        ("this run", result.value, True)
    ]
    lines.sort(key=lambda line: (finite(line[1]) is None, -line[1] if result.higher_is_better else line[1]))
    rows = tuple(
        (
            Cell(name, "good" if ours else ""),
            Cell(score(value), "good" if ours else ""),
            Cell(DASH, "faint")
            if ours
            else change_cell(result, Quality(metric=result.metric, value=value, rows=result.rows)),
        )
        for name, value, ours in lines
    )
    columns = (
        Column("method", text=True),
        Column(noun(result), unit(result)),
        Column("this run against it", unit(result) and "points"),
    )
    return Table("quality", "Against simple methods, on the same test set", columns, rows)


def program_table(ledger: Ledger) -> Table | None:
    """The exported program."""
    program = ledger.program
    if program is None:
        return None
    lines = [
        ("file", program.path),
        ("target", program.target),
        ("size", f"{number(program.size_mib)} MiB"),
        ("planned memory for activations", f"{number(program.plan_kib)} KiB"),
        ("delegated, of the MACs", f"{percent(program.delegated_macs_pct)} %"),
        ("delegated, of the operators", f"{percent(program.delegated_operators_pct)} %"),
        ("left over", plural(sum(left.count for left in program.leftovers), "operator")),
    ]
    if program.parity:
        parity = program.parity
        same = f"{percent(parity.same_prediction_pct)} % of {plural(parity.rows, parity.counted)}"
        lines += [
            ("same prediction as the eager model", same),
            ("largest difference of an output", number(parity.max_abs_difference)),
        ]
        if parity.max_relative_difference is not None:
            allowed = "" if parity.max_relative_allowed is None else f" ({parity.max_relative_allowed:g} allowed)"
            lines.append(("of its largest value", f"{parity.max_relative_difference:.1e}{allowed}"))
    else:
        lines.append(("same prediction as the eager model", "not checked"))
    lines.append(("SHA-256", program.sha256))
    columns = (Column("program", text=True), Column("", text=True))
    return Table("program", "The exported program", columns, tuple(cells(*line) for line in lines))


def leftover_table(ledger: Ledger) -> Table | None:
    """What the backend did not take, most frequent first."""
    if ledger.program is None or not ledger.program.leftovers:
        return None
    ordered = sorted(ledger.program.leftovers, key=lambda left: (-left.count, left.operator, left.module))
    columns = (Column("operator", text=True), Column("module", text=True), Column("count"))
    rows = tuple(cells(left.operator, left.module or "(top)", f"{left.count:,}") for left in ordered)
    return Table("leftovers", "Operators left to portable kernels", columns, rows)


def measured_table(ledger: Ledger) -> Table | None:
    """Timed runs of the program."""
    if not ledger.measured:
        return None
    columns = (
        Column("device", text=True),
        Column("latency, median", "ms", short="median\nms"),
        Column("p10 to p90", "ms", short="p10 to p90\nms"),
        Column("load", "ms"),
        Column("peak memory", "MiB", short="peak\nMiB"),
        Column("threads"),
        Column("runs"),
    )
    rows = tuple(
        cells(
            line.where,
            number(line.latency_ms),
            f"{number(line.latency_p10_ms)} to {number(line.latency_p90_ms)}",
            number(line.load_ms),
            number(line.peak_memory_mib),
            str(line.threads),
            f"{line.runs:,}",
        )
        for line in ledger.measured
    )
    notes: tuple[str, ...] = ("Peak memory is that of the process, above an empty one.",)
    notes += tuple(f"{line.where}: {line.note}" for line in ledger.measured if line.note)
    return Table("measured", "Measured on real machines", columns, rows, notes)


def predicted_table(ledger: Ledger) -> Table | None:
    """What the descriptors let one expect. Nothing here was timed."""
    if not ledger.predicted:
        return None
    columns = (
        Column("device", text=True),
        Column("latency", "ms"),
        Column("band", "ms"),
        Column("peak memory", "MiB", short="peak\nMiB"),
        Column("trust", text=True),
    )
    rows = tuple(
        (
            *cells(line.where, number(line.latency_ms), band(line), number(line.peak_memory_mib)),
            Cell("calibrated" if line.calibrated else "uncalibrated"),
        )
        for line in ledger.predicted
    )
    notes: tuple[str, ...] = ("Computed from device descriptors; nothing in this table was timed.",)
    notes += tuple(f"{line.where}: {line.note}" for line in ledger.predicted if line.note)
    return Table("predicted", "Predicted, not measured", columns, rows, notes)


def band(line: Predicted) -> str:
    """The latency band."""
    return f"{number(line.latency_low_ms)} to {number(line.latency_high_ms)}"


QUANTITIES = {
    "latency_ms": ("latency", "ms"),
    "size_mib": ("program size", "MiB"),
    "train_memory_mib": ("training memory", "MiB"),
    "peak_memory_mib": ("peak memory", "MiB"),
}


def verdict_table(ledger: Ledger) -> Table | None:
    """The budget, line by line."""
    if not ledger.verdicts:
        return None
    columns = (
        Column("budget", text=True),
        Column("device", text=True),
        Column("limit"),
        Column("this run"),
        Column("least to be had", short="least to\nbe had"),
        Column("", text=True),
    )
    rows = tuple(
        (
            Cell(", ".join(QUANTITIES[line.quantity])),
            *cells(line.device, number(line.limit), number(line.value), number(line.least)),
            Cell("holds", "good") if line.holds else Cell("does not hold", "bad"),
        )
        for line in ledger.verdicts
    )
    notes = tuple(f"{QUANTITIES[line.quantity][0]}: {line.note}" for line in ledger.verdicts if line.note)
    return Table("budget", "The recipe's budget, line by line", columns, rows, notes)


def training_table(ledger: Ledger) -> Table | None:
    """What each training held in memory, and how its loss went."""
    if not ledger.trainings:
        return None
    columns = (
        Column("training", text=True),
        Column("updates"),
        Column("first loss"),
        Column("last loss"),
        Column("lowest"),
        Column("gradients", "MiB"),
        Column("optimizer state", "MiB"),
        Column("peak, summed", "MiB"),
    )
    rows = []
    for training in ledger.trainings:
        losses = [point.loss for point in training.losses]
        lowest = min((loss for loss in losses if finite(loss) is not None), default=None)
        ends = (losses[0], losses[-1]) if losses else (None, None)
        rows.append(
            cells(
                step_name(ledger, training.row),
                f"{len(losses):,}",
                *(number(value) for value in (*ends, lowest)),
                number(training.gradients_mib),
                number(training.optimizer_state_mib),
                number(training.peak_memory_mib),
            )
        )
    notes = ("Peak: weights, gradients, optimizer state and kept activations, summed.",)
    return Table("trainings", "Trainings", columns, tuple(rows), notes)


def step_name(ledger: Ledger, index: int) -> str:
    """Index and name of the row with this index."""
    return next((f"{row.index} {row.step}" for row in ledger.rows if row.index == index), f"{index} (no row)")


def sentences(ledger: Ledger) -> tuple[str, ...]:
    """The run in a few sentences: result, measured, predicted, budget, notes; what is missing is named."""
    said = [result_sentence(ledger)]
    if not ledger.finished:
        said.append("This run is not finished: what follows is as far as it came.")
    for line in ledger.measured:
        said.append(f"Measured on {line.where}: {number(line.latency_ms)} ms a run, "
                    f"{number(line.peak_memory_mib)} MiB of memory.")  # fmt: skip
    if ledger.predicted:
        devices = ", ".join(f"{line.where} {number(line.latency_ms)} ms ({band(line)})" for line in ledger.predicted)
        loose = sum(not line.calibrated for line in ledger.predicted)
        trust = "" if not loose else "; uncalibrated" if loose == len(ledger.predicted) else f"; {loose} uncalibrated"
        said.append(f"Predicted: {devices}{trust}.")
    if ledger.verdicts:
        said.append(budget_sentence(ledger.verdicts))
    return (*said, *ledger.notes)


def result_sentence(ledger: Ledger) -> str:
    """From what, to what, at which quality."""
    if not ledger.rows:
        return f"{ledger.model}: no step was finished."
    loaded, reached = ledger.rows[0].size_mib, ledger.rows[-1]
    text = f"{ledger.model} on {ledger.data}: "
    if ledger.program:
        text += f"from {number(loaded)} MiB as loaded (fp32) to a program of {number(ledger.program.size_mib)} MiB"
        text += smaller(loaded, ledger.program.size_mib)
    else:
        text += f"from {number(loaded)} MiB as loaded (fp32) to {number(reached.size_mib)} MiB"
        text += f" after {reached.index} {reached.step}; no program was exported"
    result = last_quality(ledger)
    text += f"; {quality(result)}"
    if result:
        text += f" on {plural(result.rows, 'test row')}"
        known = ", ".join(f"{line.name} {score(line.value)}" for line in ledger.baselines)
        text += f" (baselines: {known})" if known else ""
    return text + "."


def smaller(before_mib: float, after_mib: float) -> str:
    """How many times smaller, where that says something."""
    if finite(before_mib) is None or finite(after_mib) is None or after_mib <= 0 or before_mib <= after_mib:
        return ""
    return f", {before_mib / after_mib:.1f} times smaller"


def budget_sentence(verdicts: tuple[Verdict, ...]) -> str:
    """Which lines of the budget do not hold."""
    broken = [line for line in verdicts if not line.holds]
    if not broken:
        return f"Budget: {'it holds' if len(verdicts) == 1 else f'all {len(verdicts)} lines hold'}."
    parts = []
    for line in broken:
        what, of = QUANTITIES[line.quantity]
        parts.append(f"{what} on {line.device} is {number(line.value)} {of} of {number(line.limit)} allowed, "
                     f"the least to be had {number(line.least)}")  # fmt: skip
    return "Budget does not hold: " + "; ".join(parts) + "."


def summary_tables(ledger: Ledger) -> tuple[Table, ...]:
    """What the terminal shows, in order."""
    candidates = (
        step_table(ledger) if ledger.rows else None,
        quality_table(ledger),
        program_table(ledger),
        leftover_table(ledger),
        measured_table(ledger),
        predicted_table(ledger),
        verdict_table(ledger),
    )
    return tuple(table for table in candidates if table is not None)
