"""A benchmark whose rows are methods, each on some models with some seeds: made by workers, kept, and summarized.

The methods of one model and seed run in one process, which prints a row for each as it is made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_real import exit_with, write_results

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
Verdict = tuple[bool, str]
RowOf = Callable[[str], Row]  # what a method makes of a model


class Table:
    """The rows, with what is asked of them."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = [row for row in rows if "failed" not in row]

    def values(self, model: str, method: str, figure: str) -> list[float]:
        """A figure with each seed."""
        rows = [row for row in self.rows if (row["model"], row["method"]) == (model, method)]
        return [row[figure] for row in rows if figure in row]

    def mean(self, model: str, method: str, figure: str) -> float | None:
        """Its mean; `None` where it was not measured."""
        values = self.values(model, method, figure)
        return statistics.mean(values) if values else None

    def ratio(self, model: str, method: str, other: str, figure: str) -> float | None:
        """One method's mean over another's."""
        one, two = self.mean(model, method, figure), self.mean(model, other, figure)
        return None if one is None or two is None else one / two

    def spread(self, model: str, method: str, figure: str, factor: float = 1.0, digits: int = 2) -> str:
        """Mean and range, as two cells of a page."""
        values = [factor * value for value in self.values(model, method, figure)]
        return f"{statistics.mean(values):.{digits}f} | {min(values):.{digits}f} to {max(values):.{digits}f}"


def file_name(name: str) -> str:
    """A model's or a method's name in the names of files."""
    return "-".join("".join(c if c.isalnum() or c in ".+" else " " for c in name).lower().split())


def run(
    script: str,
    summary: str,
    methods_of: dict[str, list[str]],
    start: Callable[[str, int], RowOf],
    out: Path,
    summarize: Callable[[Sequence[Row]], tuple[list[Verdict], str]],
) -> None:
    """The program: make the rows that are asked for, write figures and page after each, and end with the verdicts.

    `methods_of`: the methods of every model. `start`: begin with a model and a seed, in a process of its own.
    `summarize`: verdicts and page.
    """
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--models", default=",".join(methods_of))
    parser.add_argument("--methods", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        _work(start, *json.loads(given.worker))
        return
    unknown = sorted(set(given.models.split(",")) - set(methods_of))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; allowed: {', '.join(methods_of)}")
    rows: list[Row] = json.loads(given.out.read_text())["rows"] if given.keep and given.out.exists() else []
    rows = [row for row in rows if "failed" not in row]

    def write() -> list[Verdict]:
        checks, page = summarize(rows)
        write_results(given.out, rows, checks, page)
        return checks

    for seed in range(given.seeds):
        for name in given.models.split(","):
            wanted = [m for m in methods_of[name] if not given.methods or m in given.methods.split(";")]
            made = {row["method"] for row in rows if (row["model"], row["seed"]) == (name, seed)}
            missing = [method for method in wanted if method not in made]
            for row in _rows_from_worker(script, name, seed, missing) if missing else ():
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
                write()
    exit_with(write())


def _rows_from_worker(script: str, name: str, seed: int, methods: Sequence[str]) -> Iterator[Row]:
    """The rows of one model and seed, as its process prints them."""
    command = [sys.executable, script, "--worker", json.dumps([name, seed, list(methods)])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith('{"model"'):
                yield json.loads(line)
    if child.returncode:
        print(f"{name}, seed {seed}: the process ended with {child.returncode}", file=sys.stderr)


def _work(start: Callable[[str, int], RowOf], name: str, seed: int, methods: Sequence[str]) -> None:
    """Print a row for each method of one model, as it is made."""
    from edgetune.core.errors import EdgetuneError

    row_of = start(name, seed)
    for method in methods:
        try:
            result = row_of(method)
        except (EdgetuneError, ImportError) as error:
            result = {"failed": str(error)}
        print("\n" + json.dumps({"model": name, "seed": seed, "method": method, **result}), flush=True)
