"""The ledger in a terminal, by rich, or as plain text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from edgetune.core.ledger import Ledger
from edgetune.report.sentences import budget, headline, notes, remarks
from edgetune.report.summary import summary_tables
from edgetune.report.tables import Cell, Column, Table

WIDE = 112  # characters from which the full headings fit
LONGEST_DEVICE = 22  # characters: jetson-orin-nano-super
WITHOUT_SETTINGS = ("load", "finalize")  # steps whose detail repeats the title or the steps before
STYLES = {"": "", "good": "green", "bad": "bold red", "faint": "dim"}


class Terminal:
    """A rich renderable that fits itself to the width it is given, from 80 columns up."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Title, headline, remarks, budget, notes, tables."""
        width = options.max_width
        ledger = self.ledger
        yield Text.assemble(
            (clean(ledger.recipe), "bold"), (clean(f"  {ledger.model} on {ledger.data}, seed {ledger.seed}"), "dim")
        )
        yield Text(clean(headline(ledger)), style="bold")
        for remark in remarks(ledger):
            yield Text(f"! {clean(remark)}", style="red")
        for sentence in (*budget(ledger), *notes(ledger)):
            yield Text(clean(sentence))
        for table in summary_tables(ledger):
            hidden = table.key == "steps" and any(column.room > width for column in table.columns if column.text)
            yield from draw_section(table, width, below=settings_lines(ledger) if hidden else ())


def draw_section(table: Table, width: int, below: Iterable[RenderableType] = ()) -> Iterator[RenderableType]:
    """A table under its title, with what belongs below it and its notes."""
    yield Text("")
    yield Text(table.title, style="bold")
    yield draw_table(table, width)
    yield from below
    for note in table.notes:
        yield Text(clean(note), style="dim")


def draw_table(table: Table, width: int) -> RichTable:
    """One table, without the columns that do not fit."""
    shown = [index for index, column in enumerate(table.columns) if column.room <= width]
    tight = _natural_width(table, shown, width >= WIDE) > width
    still_tight = tight and _natural_width(table, shown, width >= WIDE, short=True) > width
    named = table.key != "program"
    rich_table = RichTable(
        box=box.SIMPLE_HEAD if named else None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        show_header=named,
        header_style="dim",
    )
    for index in shown:
        column = table.columns[index]
        rich_table.add_column(
            heading(column, width >= WIDE),
            justify="left" if column.text else "right",
            no_wrap=not column.text or column.heading == "step",
            max_width=column.narrow or None if still_tight else None,
            min_width=_longest_name(table, index) if column.heading == "device" else None,
            overflow="fold",
        )
    for row in table.rows:
        rich_table.add_row(*(style_cell(row[index], short=tight) for index in shown))
    return rich_table


def _natural_width(table: Table, shown: list[int], wide: bool, *, short: bool = False) -> int:
    """Characters that these columns take where nothing wraps; `short`: with the short texts of the cells."""
    widths = [
        max(len(line) for text in (heading(table.columns[index], wide), *cells) for line in text.split("\n"))
        for index in shown
        for cells in [[(short and row[index].short) or row[index].text for row in table.rows]]
    ]
    return sum(widths) + 2 * (len(widths) - 1)


def _longest_name(table: Table, index: int) -> int:
    """Characters of the longest word in a column that must not be split."""
    lengths = [len(word) for row in table.rows for word in row[index].text.split()]
    return max((length for length in lengths if length <= LONGEST_DEVICE), default=1)


def heading(column: Column, wide: bool) -> str:
    """The heading with its unit below."""
    if column.short and not wide:
        return column.short
    return f"{column.heading}\n{column.unit}" if column.unit else column.heading


def style_cell(cell: Cell, *, short: bool = False) -> Text:
    """A cell as rich text; markup in it stays text."""
    return Text(clean(cell.short if short and cell.short else cell.text), style=STYLES[cell.tone])


def settings_lines(ledger: Ledger) -> Iterator[RenderableType]:
    """The settings of each step below the table, if their column does not fit."""
    for row in ledger.rows:
        if row.detail and row.step not in WITHOUT_SETTINGS:
            yield Padding(Text(clean(f"{row.index} {row.step}: {row.detail}"), style="dim"), (0, 0, 0, 2))


def clean(text: str) -> str:
    """Replace control characters, so that a name from a file cannot control the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def text(ledger: Ledger, width: int = 120) -> str:
    """The ledger as plain text, the same on every machine."""
    file = io.StringIO()
    console = Console(
        file=file, width=width, height=100, color_system=None, force_terminal=False, force_jupyter=False,
        legacy_windows=False, safe_box=True, highlight=False, emoji=False, markup=False,
    )  # fmt: skip
    console.print(Terminal(ledger))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"
