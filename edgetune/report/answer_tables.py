"""Figures per class, the confusion matrix and the most confident mistakes, as tables."""

from __future__ import annotations

from dataclasses import replace

from edgetune.ledger import Answers
from edgetune.report.numbers import percent, plural
from edgetune.report.tables import Cell, Column, Table, cells

WIDEST_MATRIX = 12  # classes; with more, the most frequent confusions are listed
MOST_PAIRS = 15
MOST_LETTERS = 10  # of a class's name over a column


def answer_tables(answers: Answers) -> tuple[Table, ...]:
    """Those that there is something to say in, in order."""
    candidates = (class_table(answers), confusion_table(answers), mistake_table(answers))
    return tuple(table for table in candidates if table is not None)


def brief_table(answers: Answers) -> Table:
    """The figures per class, with the most frequent confusion in words: a terminal shows much else."""
    table = class_table(answers)
    if not answers.confusions:
        return table
    first = answers.confusions[0]
    often = f"Most often confused: {first.true} taken for {first.predicted} ({plural(first.rows, 'row')})."
    return replace(table, notes=(f"{often} The confusion matrix and the most confident mistakes are on the page.",))


def class_table(answers: Answers) -> Table:
    """Precision, recall and rows of each class."""
    columns = (
        Column("class", text=True),
        Column("rows"),
        Column("precision", "%"),
        Column("recall", "%"),
        Column("right"),
        Column("answered"),
    )
    rows = tuple(
        cells(
            one.name,
            f"{one.rows:,}",
            percent(one.precision_pct),
            percent(one.recall_pct),
            f"{one.right:,}",
            f"{one.predicted:,}",
        )
        for one in answers.classes
    )
    notes = (
        "Precision: of the rows that the model takes for this class, those that are. "
        "Recall: of the rows of this class, those that it finds.",
    )
    return Table("classes", "Class by class", columns, rows, notes)


def confusion_table(answers: Answers) -> Table | None:
    """A row for each true class and a column for each predicted one; the frequent confusions of many classes."""
    if len(answers.classes) > WIDEST_MATRIX:
        return _pairs(answers)
    names = [one.name for one in answers.classes]
    counted = {(one.true, one.predicted): one.rows for one in answers.confusions}
    counted |= {(one.name, one.name): one.right for one in answers.classes}
    columns = (Column("true, answered as", text=True), *(Column(_cut(name, MOST_LETTERS)) for name in names))
    rows = tuple(
        (Cell(true), *(_count(counted.get((true, predicted), 0), true == predicted) for predicted in names))
        for true in names
    )
    return Table(
        "confusion", "Confusion matrix: rows of each class, by the class that the model takes them for", columns, rows
    )


def _count(rows: int, right: bool) -> Cell:
    if not rows:
        return Cell("0", "faint")
    return Cell(f"{rows:,}", "good" if right else "bad")


def _pairs(answers: Answers) -> Table | None:
    if not answers.confusions:
        return None
    columns = (Column("true", text=True), Column("answer", text=True), Column("rows"))
    rows = tuple(cells(one.true, one.predicted, f"{one.rows:,}") for one in answers.confusions[:MOST_PAIRS])
    left = len(answers.confusions) - len(rows)
    notes = (f"{plural(left, 'rarer pair')} left out.",) if left else ()
    return Table("confusion", "The most frequent confusions", columns, rows, notes)


def mistake_table(answers: Answers) -> Table | None:
    """The mistakes that the model is surest of."""
    if not answers.mistakes:
        return None
    columns = (
        Column("row", text=True),
        Column("true", text=True),
        Column("answer", text=True),
        Column("confidence", "%", short="conf.\n%"),
    )
    rows = tuple(
        (
            Cell(one.text or f"row {one.row}", image=one.image),
            Cell(one.true),
            Cell(one.predicted, "bad"),
            Cell(percent(one.confidence_pct)),
        )
        for one in answers.mistakes
    )
    return Table("mistakes", "The most confident mistakes", columns, rows)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
