"""`python -m edgetune.runtime.clock.many FOLDER`: time many programs, each in a fork of one process.

It reads `request.json` (threads, seconds, names), `<name>.pte` and `<name>.pt`, and prints one JSON line per program.
Programs get forks, because in one process each would reuse the workspace of those before it, and a crash would end all.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import events, machine
from .runs import load_runtime

_LEAST_RUNS = 5


def main(folder: Path) -> int:
    """Time the programs that the request names."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    machine.pin(int(request["threads"]))
    runtime = load_runtime(None)  # without threads until a fork sets them
    for name in request["names"]:
        fork = os.fork()
        if fork == 0:
            os._exit(_time_program(runtime, folder, name, int(request["threads"]), float(request["seconds"])))
        status = os.waitpid(fork, 0)[1]
        if status != 0:
            _print_json({"name": name, "state": "failed", "error": f"it crashed its process (status {status})"})
    return 0


def _time_program(runtime: Any, folder: Path, name: str, threads: int, seconds: float) -> int:
    try:
        runtime._unsafe_reset_threadpool(threads)
        torch.set_num_threads(threads)  # a kernel that calls BLAS would wait for a second thread on the same core
        _print_json({"name": name, "state": "done", **_time_calls(runtime, folder, name, seconds)})
    except Exception as error:  # a program that does not load or run: continue with the others
        _print_json({"name": name, "state": "failed", "error": f"{type(error).__name__}: {error}"})
    return 0


def _print_json(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def _time_calls(runtime: Any, folder: Path, name: str, seconds: float) -> dict[str, Any]:
    """Load time, the median and spread of the runs after a warm-up of a third of the time, and the instructions."""
    path, inputs = str(folder / f"{name}.pte"), tuple(torch.load(folder / f"{name}.pt", weights_only=True))
    begun = time.perf_counter()
    program = runtime._load_program(path)
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
    median_us = statistics.median(runs)
    del method, program
    program = runtime._load_program(path, enable_etdump=True)
    method = program.load_method("forward")
    (instructions,) = events.record(
        program, lambda given: method.call(given, clone_outputs=False), [inputs], seconds, [median_us]
    )
    return {
        "us": median_us,
        "p10_us": runs[len(runs) // 10],
        "p90_us": runs[9 * len(runs) // 10],
        "load_ms": load_ms,
        "instructions": instructions,
    }


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
