"""`python -m edgetune.export.clock.many FOLDER`: time many programs in one process, one after the other.

It answers `request.json` (threads, seconds, rounds, names), with `<name>.pte` and `<name>.pt` beside it, and prints
one JSON line for each program that it has timed, so that nothing is lost when one of them takes the process down.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import machine
from .runs import loaded_runtime

_LEAST_RUNS = 5


def main(folder: Path) -> int:
    """Run as a program."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    machine.pin(int(request["threads"]))
    runtime = loaded_runtime(int(request["threads"]))
    for name in request["names"]:
        print(json.dumps({"name": name, "state": "begun"}), flush=True)
        try:
            told = {"state": "done", **_timed(runtime, folder, name, float(request["seconds"]))}
        except Exception as error:  # one program that does not load or run: the others go on
            told = {"state": "failed", "error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"name": name, **told}), flush=True)
    return 0


def _timed(runtime: Any, folder: Path, name: str, seconds: float) -> dict[str, float]:
    """Load time, and the median and spread of the runs, after a warm-up of a third of the time."""
    inputs = torch.load(folder / f"{name}.pt", weights_only=True)
    begun = time.perf_counter()
    program = runtime._load_program(str(folder / f"{name}.pte"))
    method = program.load_method("forward")
    load_ms = (time.perf_counter() - begun) * 1e3
    until = time.perf_counter() + seconds / 3
    method.call(inputs, clone_outputs=False)
    while time.perf_counter() < until:
        method.call(inputs, clone_outputs=False)
    runs: list[float] = []
    until = time.perf_counter() + seconds
    while len(runs) < _LEAST_RUNS or time.perf_counter() < until:
        started = time.perf_counter()
        method.call(inputs, clone_outputs=False)
        runs.append((time.perf_counter() - started) * 1e6)
    runs.sort()
    return {
        "us": statistics.median(runs),
        "p10_us": runs[len(runs) // 10],
        "p90_us": runs[9 * len(runs) // 10],
        "load_ms": load_ms,
    }


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
