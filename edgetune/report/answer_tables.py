"""Figures per class, the confusion matrix and the most confident mistakes, as tables."""

from __future__ import annotations

from dataclasses import replace

from edgetune.core.ledger import Answers
from edgetune.core.numbers import format_percent, pluralize
from edgetune.report.tables import Cell, Column, Table, cells

WIDEST_MATRIX = 12  # classes; with more, the most frequent confusions are listed
MOST_PAIRS = 15
MOST_CLASSES = 5  # in a terminal
MOST_LETTERS = 10  # of a class's name over a column


def answer_tables(answers: Answers) -> tuple[Table, ...]:
    """The tables that have rows, in order."""
    candidates = (class_table(answers), confusion_table(answers), mistake_table(answers))
    return tuple(table for table in candidates if table is not None)


def brief_table(answers: Answers) -> Table:
    """The classes with the lowest recall, and the most frequent confusion in words, for a terminal."""
    table = class_table(answers)
    measured = [index for index, one in enumerate(answers.classes) if one.recall_pct is not None]
    lowest = sorted(measured, key=lambda index: answers.classes[index].recall_pct or 0.0)[:MOST_CLASSES]
    notes = []
    if answers.confusions:
        first = answers.confusions[0]
        often = f"{first.true} predicted as {first.predicted} ({pluralize(first.rows, 'row')})"
        notes = [f"Most often confused: {often}."]
    left = len(table.rows) - len(lowest)
    title = f"Classes with the lowest recall ({pluralize(left, 'other')} on the page)" if left else table.title
    shown = tuple(tuple(table.rows[index][:4]) for index in (lowest if left else range(len(table.rows))))
    return replace(table, title=title, columns=table.columns[:4], rows=shown, notes=tuple(notes))


def class_table(answers: Answers) -> Table:
    """Precision, recall and rows of each class."""
    columns = (
        Column("class", text=True),
        Column("rows"),
        Column("precision", "%"),
        Column("recall", "%"),
        Column("correct"),
        Column("times predicted"),
    )
    rows = tuple(
        cells(
            one.name,
            f"{one.rows:,}",
            format_percent(one.precision_pct),
            format_percent(one.recall_pct),
            f"{one.right:,}",
            f"{one.predicted:,}",
        )
        for one in answers.classes
    )
    notes = (
        "Precision: the share of the rows predicted as this class that belong to it. "
        "Recall: the share of the rows of this class that are predicted as it.",
    )
    return Table("classes", "Classes", columns, rows, notes)


def confusion_table(answers: Answers) -> Table | None:
    """A row for each true class and a column for each predicted one; the frequent confusions of many classes."""
    if len(answers.classes) > WIDEST_MATRIX:
        return _frequent_confusions(answers)
    names = [one.name for one in answers.classes]
    counted = {(one.true, one.predicted): one.rows for one in answers.confusions}
    counted |= {(one.name, one.name): one.right for one in answers.classes}
    columns = (Column("true, predicted as", text=True), *(Column(_truncate(name, MOST_LETTERS)) for name in names))
    rows = tuple(
        (Cell(true), *(_count(counted.get((true, predicted), 0), true == predicted) for predicted in names))
        for true in names
    )
    return Table("confusion", "Confusion matrix: rows by true class and predicted class", columns, rows)


def _count(rows: int, right: bool) -> Cell:
    if not rows:
        return Cell("0", "faint")
    return Cell(f"{rows:,}", "good" if right else "bad")


def _frequent_confusions(answers: Answers) -> Table | None:
    if not answers.confusions:
        return None
    columns = (Column("true", text=True), Column("prediction", text=True), Column("rows"))
    rows = tuple(cells(one.true, one.predicted, f"{one.rows:,}") for one in answers.confusions[:MOST_PAIRS])
    left = len(answers.confusions) - len(rows)
    notes = (f"{pluralize(left, 'rarer pair')} not shown.",) if left else ()
    return Table("confusion", "The most frequent confusions", columns, rows, notes)


def mistake_table(answers: Answers) -> Table | None:
    """The mistakes with the highest confidence."""
    if not answers.mistakes:
        return None
    columns = (
        Column("row", text=True),
        Column("true", text=True),
        Column("prediction", text=True),
        Column("confidence", "%", short="conf.\n%"),
    )
    rows = tuple(
        (
            Cell(one.text or f"row {one.row}", image=one.image),
            Cell(one.true),
            Cell(one.predicted, "bad"),
            Cell(format_percent(one.confidence_pct)),
        )
        for one in answers.mistakes
    )
    return Table("mistakes", "The most confident mistakes", columns, rows)


def _truncate(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
