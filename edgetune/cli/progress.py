"""Progress of a run on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from edgetune.core.progress import NOTE
from edgetune.core.progress import Progress as Report

FEW = 16  # parts that get no line at each quarter


@contextmanager
def show_progress() -> Iterator[Report]:
    """A callback `(stage, done, of, detail)` that shows progress until the block ends."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
        return
    columns = TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    detail = TextColumn("{task.fields[detail]}", markup=False)
    with Progress(*columns, detail, console=console, transient=True) as bars:  # what stays is the result
        yield Bars(bars)


class Lines:
    """Prints a line at each quarter of a long stage, at both ends of a short one, and when any other is done."""

    def __init__(self) -> None:
        self.stage, self.quarter = "", -1

    def __call__(self, stage: str, done: int, of: int, detail: str) -> None:
        """Print, if there is something new."""
        if stage == NOTE:
            print(f"note: {detail}", file=sys.stderr, flush=True)
            return
        quarter = 4 * done // of if of > FEW else 4 * (done >= of)
        if (stage, quarter) == (self.stage, self.quarter) or (of == 1 and not done):
            return
        self.stage, self.quarter = stage, quarter
        print(f"{stage} {f'{done}/{of} ' if of > 1 else ''}{detail}".rstrip(), file=sys.stderr, flush=True)


class Bars:
    """One bar for each stage, all of them visible until the block ends."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.stage: str = ""
        self.task: TaskID | None = None

    def __call__(self, stage: str, done: int, of: int, detail: str) -> None:
        """Move the bar, or start the next one."""
        if stage == NOTE:
            self.bars.console.print(f"note: {detail}", markup=False, highlight=False)
            return
        if self.task is None or stage != self.stage:
            self.stage, self.task = stage, self.bars.add_task(stage, total=of, detail=detail)
        self.bars.update(self.task, completed=done, total=of, detail=detail)
        if done >= of:
            self.task = None  # the next one is a new bar, even if it is called the same
