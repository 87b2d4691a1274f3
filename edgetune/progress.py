"""Progress on stderr: bars in a terminal, one line for each stage elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[str, int, int, str], None]


@contextmanager
def shown(quiet: bool = False) -> Iterator[Report]:
    """A callback `(what, done, of, detail)` that shows how far the work has come; shows nothing if `quiet`."""
    if quiet:
        yield lambda *_: None
    elif sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield _lines()


@contextmanager
def _bars() -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", style="dim"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        open_tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, of: int, detail: str) -> None:
            if what not in open_tasks:
                open_tasks[what] = progress.add_task(what, total=of, detail=detail)
            progress.update(open_tasks[what], completed=done, total=of, detail=detail[:60])
            if done >= of:
                progress.stop_task(open_tasks.pop(what))

        yield report


def _lines() -> Report:
    started = time.monotonic()
    tenths: dict[str, int] = {}

    def report(what: str, done: int, of: int, detail: str) -> None:
        tenth = 10 * done // max(of, 1)
        if tenths.get(what) == tenth:
            return
        tenths[what] = tenth
        if done >= of:
            tenths.pop(what)
        print(f"[{time.monotonic() - started:6.1f} s] {what} {done}/{of} {detail}".rstrip(), file=sys.stderr)

    return report
