"""The steps, the baselines, the trainings and the program as tables, for the terminal and for the page alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from edgetune.core.ledger import METRICS, Ledger, Program, Quality, Row, Shift
from edgetune.core.numbers import (
    DASH,
    capitalize_first,
    finite_or_none,
    format_change,
    format_count,
    format_number,
    format_percent,
    format_score,
    format_seconds,
    metric_noun,
    metric_unit,
    pluralize,
)
from edgetune.core.parity import Parity, RoundingTies

Tone = Literal["", "good", "bad", "faint"]

_PREDICTIONS = 100  # of fewer, the share that is the same says little


@dataclass(frozen=True)
class Column:
    """A column; in a narrow terminal `short` is its heading, unit included, and `narrow` its maximum width.

    `room` is the table width from which the column is shown.
    """

    heading: str
    unit: str = ""
    text: bool = False  # left-aligned, may wrap in a terminal
    wraps: bool = False  # on the page too
    short: str = ""
    room: int = 0  # characters
    narrow: int = 0  # characters; 0: no limit


@dataclass(frozen=True)
class Cell:
    """One entry of a table."""

    text: str
    tone: Tone = ""
    image: str = ""  # a data: URI, for the page
    short: str = ""  # instead of the text where a terminal is narrow


@dataclass(frozen=True)
class Table:
    """A caption, columns, rows and the notes below them."""

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
    return finite_or_none(now.value - before.value)


def change_cell(now: Quality | None, before: Quality | None) -> Cell:
    """A change, colored by whether it is an improvement."""
    difference = gain(now, before)
    text = format_change(difference)
    if now is None or difference is None or text == "0.00":
        return Cell(text, "faint")
    return Cell(text, "good" if (difference > 0) == now.higher_is_better else "bad")


def step_table(ledger: Ledger) -> Table:
    """One row for each step."""
    metric = last_quality(ledger)
    name, of, points = (
        (metric_noun(metric), metric_unit(metric), metric_unit(metric) and "points") if metric else ("quality", "", "")
    )
    short = "\n".join(filter(None, (METRICS[metric.metric].short, of))) if metric else "qual."
    columns = (
        Column("step", text=True),
        Column("settings", text=True, wraps=True, room=150),
        Column(name, of, short=short),
        Column("vs. load", points, short="vs.\nload"),
        Column("change", points, room=96),
        Column("parameters", short="params"),
        Column("trainable", short="train-\nable"),
        Column("size", "MiB"),
        Column("MACs"),
        Column("saved for backward", "MiB", short="saved\nMiB"),
        Column("time", "s"),
    )
    rows = tuple(step_row(ledger.rows, index) for index in range(len(ledger.rows)))
    notes = group_notes((str(row.index), row.note) for row in ledger.rows)
    notes = [*(f"{row.index}: {describe_shift(row.shift)}" for row in ledger.rows if row.shift), *notes]
    notes.insert(0, measured_on(metric) if metric else "No quality was measured.")
    if any(not row.note and None in (row.quality, row.macs, row.saved_for_backward_mib) for row in ledger.rows):
        notes.append(f"{DASH}: not measured.")
    return Table("steps", "Step by step", columns, rows, tuple(notes))


def describe_shift(shift: Shift) -> str:
    """`0.8 % of 1,500 predictions changed; KL divergence to the model before: 0.0032.`"""
    return (
        f"{format_percent(shift.changed_pct)} % of {pluralize(shift.predictions, 'prediction')} changed; "
        f"KL divergence to the model before: {shift.kl_divergence:.2g}."
    )


def group_notes(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Each note once, with all names that it applies to; empty ones are left out.

    >>> group_notes([("a", "new"), ("b", ""), ("c", "new")])
    ['a, c: new']
    """
    names: dict[str, list[str]] = {}
    for name, note in notes:
        if note:
            names.setdefault(note, []).append(name)
    return [f"{', '.join(of)}: {note}" for note, of in names.items()]


def measured_on(metric: Quality) -> str:
    """The test set and the uncertainty of the quality column."""
    text = f"{capitalize_first(metric_noun(metric))} on {pluralize(metric.rows, 'test row')}"
    interval = metric.interval_pct
    if interval is not None:
        text += f" (95 % interval of the last: {interval[0]:.1f} to {interval[1]:.1f} %)"
    return f"{text}." if metric.higher_is_better else f"{text}; lower is better."


def step_row(rows: tuple[Row, ...], index: int) -> tuple[Cell, ...]:
    """The cells of one step."""
    row = rows[index]
    return (
        Cell(f"{row.index} {row.step}"),
        Cell(row.detail, "faint"),
        *cells(format_score(row.quality.value) if row.quality else DASH),
        change_cell(row.quality, rows[0].quality) if index else Cell(DASH, "faint"),
        change_cell(row.quality, rows[index - 1].quality) if index else Cell(DASH, "faint"),
        *cells(
            format_count(row.parameters),
            format_count(row.trainable_parameters),
            format_number(row.size_mib),
            format_count(row.macs),
        ),
        *cells(format_number(row.saved_for_backward_mib), format_seconds(row.seconds)),
    )


def quality_table(ledger: Ledger) -> Table | None:
    """The result beside the baselines, best first."""
    result = last_quality(ledger)
    if result is None or not ledger.baselines:
        return None
    lines = [(baseline.name, baseline.value, False) for baseline in ledger.baselines] + [
        ("this run", result.value, True)
    ]
    lines.sort(key=lambda line: (finite_or_none(line[1]) is None, -line[1] if result.higher_is_better else line[1]))
    rows = tuple(
        (
            Cell(name, "good" if ours else ""),
            Cell(format_score(value), "good" if ours else ""),
            Cell(DASH, "faint")
            if ours
            else change_cell(result, Quality(metric=result.metric, value=value, rows=result.rows)),
        )
        for name, value, ours in lines
    )
    columns = (
        Column("baseline", text=True),
        Column(metric_noun(result), metric_unit(result)),
        Column("this run minus baseline", metric_unit(result) and "points"),
    )
    return Table("quality", "Compared with baselines on the same test set", columns, rows)


def program_table(ledger: Ledger, *, brief: bool = False) -> Table | None:
    """The exported program; `brief`: in fewer lines, for a terminal."""
    program = ledger.program
    if program is None:
        return None
    lines = _brief_lines(program) if brief else _lines(program)
    columns = (Column("program", text=True), Column("", text=True))
    return Table("program", "Exported program", columns, tuple(cells(*line) for line in lines))


def _lines(program: Program) -> list[tuple[str, str]]:
    lines = [
        ("file", program.path),
        ("target", program.target),
        ("size", f"{format_number(program.size_mib)} MiB"),
        ("planned activation memory", f"{format_number(program.plan_kib)} KiB"),
        ("delegated, of the MACs", f"{format_percent(program.delegated_macs_pct)} %"),
        ("delegated, of the operators", f"{format_percent(program.delegated_operators_pct)} %"),
        ("undelegated", undelegated(program)),
        ("same prediction as the PyTorch model", _same_prediction(program)),
    ]
    if program.parity:
        lines.append(("largest output difference", format_number(program.parity.max_abs_difference)))
        if program.parity.max_relative_difference is not None:
            lines.append(("relative to the largest output", _relative(program.parity)))
        if program.parity.ties is not None:
            lines.append(("PyTorch beside itself, moved by float noise", _ties(program.parity.ties)))
    return [*lines, ("SHA-256", program.sha256)]


def _brief_lines(program: Program) -> list[tuple[str, str]]:
    shares = (
        f"{format_percent(program.delegated_macs_pct)} % of the MACs, "
        f"{format_percent(program.delegated_operators_pct)} % of the "
        "operators"
    )
    lines = [
        ("file", f"{program.path}, {program.target}, {format_number(program.size_mib)} MiB"),
        ("delegated", shares),
        ("undelegated", undelegated(program, brief=True)),
        ("same prediction as PyTorch", _same_prediction(program)),
    ]
    if program.parity:
        absolute = format_number(program.parity.max_abs_difference)
        relative = program.parity.max_relative_difference is not None
        difference = f"{absolute}; relative: {_relative(program.parity)}" if relative else absolute
        lines.append(("largest output difference", difference))
        if program.parity.ties is not None:
            lines.append(("PyTorch, by rounding ties", _ties(program.parity.ties)))
    return lines


def _same_prediction(program: Program) -> str:
    parity = program.parity
    if parity is None:
        return "not checked"
    return f"{format_percent(parity.same_prediction_pct)} % of {pluralize(parity.rows, parity.counted)}"


def _ties(ties: RoundingTies) -> str:
    """How far the model is from itself when activations between two codes are rounded the other way."""
    changed = f"{ties.changed:,} of {ties.activations:,} 8-bit activations"
    enough = ties.predictions >= _PREDICTIONS
    same = f"same prediction {format_percent(ties.same_prediction_pct)} %, " if enough else ""
    return f"{same}relative: {ties.max_relative_difference:.1e} ({changed} lie between two codes)"


def _relative(parity: Parity) -> str:
    allowed = "" if parity.max_relative_allowed is None else f" ({parity.max_relative_allowed:g} allowed)"
    return f"{parity.max_relative_difference:.1e}{allowed}"


def undelegated_table(ledger: Ledger) -> Table | None:
    """The operators that the backend did not take, most frequent first."""
    if ledger.program is None or not ledger.program.undelegated:
        return None
    ordered = sorted(ledger.program.undelegated, key=lambda left: (-left.count, left.operator, left.module))
    columns = (Column("operator", text=True), Column("module", text=True), Column("count"))
    rows = tuple(cells(left.operator, left.module or "(top)", f"{left.count:,}") for left in ordered)
    return Table("undelegated", "Undelegated operators", columns, rows)


def undelegated(program: Program, *, brief: bool = False) -> str:
    """How many operators the backend did not take; `brief`: with the most frequent one, for want of a table."""
    text = pluralize(sum(left.count for left in program.undelegated), "operator")
    if not brief or not program.undelegated:
        return text
    counts: Counter[str] = Counter()
    for left in program.undelegated:
        counts[left.operator.removesuffix(".out")] += left.count
    ((name, many),) = counts.most_common(1)
    return f"{text}, most often {name} ({many})" if len(counts) > 1 else f"{text}: {name}"


def training_table(ledger: Ledger) -> Table | None:
    """The memory and the losses of each training."""
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
        Column("peak memory", "MiB"),
    )
    rows = []
    for training in ledger.trainings:
        losses = [point.loss for point in training.losses]
        lowest = min((loss for loss in losses if finite_or_none(loss) is not None), default=None)
        ends = (losses[0], losses[-1]) if losses else (None, None)
        rows.append(
            cells(
                step_name(ledger, training.row),
                f"{len(losses):,}",
                *(format_number(value) for value in (*ends, lowest)),
                format_number(training.gradients_mib),
                format_number(training.optimizer_state_mib),
                format_number(training.peak_memory_mib),
            )
        )
    notes = ("Peak memory is the sum of weights, gradients, optimizer state and the tensors saved for backward.",)
    return Table("trainings", "Trainings", columns, tuple(rows), notes)


def step_name(ledger: Ledger, index: int) -> str:
    """Index and name of the row with this index."""
    return next((f"{row.index} {row.step}" for row in ledger.rows if row.index == index), f"{index} (no row)")
