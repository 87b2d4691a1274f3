"""Run and time a program in a child process, since a bad `.pte` can crash its process.

`python -m edgetune.runtime.run FOLDER` is the child that runs: it reads `request.json` and `inputs.pt` and writes
`outputs.safetensors` and `result.json`. The child that times is `edgetune.runtime.clock`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from edgetune.runtime import forks
from edgetune.runtime.child_failures import child_error
from edgetune.runtime.clock.events import Instruction
from edgetune.runtime.clock.runs import ENVIRONMENT, load_runtime, read_inputs, serve

_MODULE = "edgetune.runtime.run"
_CLOCK = "edgetune.runtime.clock"


class State(BaseModel):
    """Temperatures and clocks of a machine at one moment, as far as they can be read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature_c: dict[str, float] = Field(default_factory=dict)  # by sensor
    clock_mhz: dict[str, float] = Field(default_factory=dict)  # by core


class Timing(BaseModel):
    """One program timed in a fresh process. Memory is resident memory of the whole process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int
    load_ms: float
    first_ms: float  # the first execution, with everything cold
    latencies_ms: tuple[float, ...]  # after the warm-up
    warm_up_runs: int
    peak_memory_mib: float
    empty_memory_mib: float  # after the imports, before the program is loaded
    cores: tuple[int, ...] = ()  # that the process was pinned to; empty if pinning is not possible
    states: tuple[State, ...] = ()  # before the timed runs and after each batch of them
    energy_mj: float | None = None  # of one run; None: not measured
    energy_note: str = ""  # the meter, or why there is none
    instructions: tuple[Instruction, ...] = ()  # of one run, if they were recorded

    @property
    def latency_ms(self) -> float:
        """The median."""
        return statistics.median(self.latencies_ms)


def run_in_child(
    path: str | Path, batches: Sequence[tuple[Tensor, ...]], *, method: str = "forward", data: Path | None = None
) -> list[tuple[Tensor, ...]]:
    """Execute a method once for each tuple of inputs, in a child process; returns the outputs of each.

    `data` is the `.ptd` with the weights, if there is one. Raises `EdgetuneError` (exit code 5) if the program does not
    load or run, or the child dies.
    """
    request = {"method": method, "data": _absolute(data)}
    _, tensors = ask_child(_MODULE, Path(path), request, batches)
    return _outputs_by_row(tensors, len(batches))


def run_programs(programs: Sequence[tuple[Path, tuple[Tensor, ...]]]) -> list[tuple[Tensor, ...] | None]:
    """Execute each program once on its inputs, all in one child process; `None` for one that does not run.

    Raises `EdgetuneError` (exit code 5) if the child dies.
    """
    if not programs:
        return []
    request = {"programs": [_absolute(path) for path, _ in programs]}
    result, tensors = ask_child(_MODULE, programs[0][0], request, [inputs for _, inputs in programs])
    outputs = _outputs_by_row(tensors, len(programs))
    return [None if row in result["failed"] else output for row, output in enumerate(outputs)]


def _outputs_by_row(tensors: dict[str, Tensor], rows: int) -> list[tuple[Tensor, ...]]:
    """From tensors with the keys `ROW.INDEX`."""
    outputs: list[list[Tensor]] = [[] for _ in range(rows)]
    for key in sorted(tensors, key=lambda key: [int(part) for part in key.split(".")]):
        outputs[int(key.partition(".")[0])].append(tensors[key])
    return [tuple(output) for output in outputs]


def time_calls(
    path: Path, request: dict[str, Any], calls: Sequence[tuple[Tensor, ...]], *, data: Path | None = None
) -> tuple[Timing, ...]:
    """Time each call in one child process, by `edgetune.runtime.clock`. Raises as `run_in_child` does.

    Warm-up ends when two windows of five runs agree within 5 %, or after `warm_up_seconds` of the request. At least ten
    runs are timed. With a data file the first run loads the method, and `first_ms` includes that.
    """
    result, _ = ask_child(_CLOCK, path, {**request, "data": _absolute(data)}, calls, fresh=True)
    return tuple(Timing.model_validate(call) for call in result["calls"])


def _absolute(path: Path | None) -> str | None:
    return str(path.resolve()) if path is not None else None


def ask_child(
    module: str,
    path: Path,
    request: dict[str, Any],
    batches: Sequence[tuple[Tensor, ...]],
    *,
    fresh: bool = False,
    on_line: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Run `python -m module` on a request about the program at `path`. Returns its answer and its tensors.

    `fresh`: in a new process, to measure time and memory, not in a fork with torch and the runtime imported. `on_line`
    then gets each line that the child prints.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(prefix="edgetune-") as name:
        folder = Path(name)
        write_request(folder, {**request, "path": str(path.resolve())}, batches)
        done = (None if fresh else _run_fork(module, folder)) or _run_process(module, folder, on_line)
        answer = folder / "result.json"
        result = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else None
        if done.returncode != 0 or result is None or "error" in result:
            raise child_error(path, done, result)
        saved = folder / "outputs.safetensors"
        return result, load_file(saved) if saved.is_file() else {}


def write_request(folder: Path, request: dict[str, Any], batches: Sequence[tuple[Tensor, ...]]) -> None:
    """Write `request.json`, and the rows in `inputs.pt`, for the child."""
    own = {id(tensor): tensor.detach().cpu().contiguous().clone() for batch in batches for tensor in batch}
    # what several rows share, such as an adapter, is written once
    torch.save([tuple(own[id(tensor)] for tensor in batch) for batch in batches], folder / "inputs.pt")
    (folder / "request.json").write_text(json.dumps({**request, "rows": len(batches)}), encoding="utf-8")


def _run_fork(module: str, folder: Path) -> subprocess.CompletedProcess[str] | None:
    code = forks.run(module, folder)
    if code is None:
        return None
    errors = folder / "stderr"
    text = errors.read_text(encoding="utf-8", errors="replace") if errors.is_file() else ""
    return subprocess.CompletedProcess([module, str(folder)], code, "", text)


def _run_process(module: str, folder: Path, on_line: Callable[[str], None]) -> subprocess.CompletedProcess[str]:
    """Run the child to its end, in the folder, where nothing can shadow a package."""
    with (
        (folder / "stderr").open("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
            cwd=folder,
            env={**ENVIRONMENT, **os.environ},
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
        ) as child,
    ):
        try:
            assert child.stdout is not None
            for line in child.stdout:
                on_line(line)
            code = child.wait()
        finally:  # interrupted, or `on_line` raised
            child.kill()
        errors.seek(0)
        return subprocess.CompletedProcess(child.args, code, "", errors.read())


# The child's side.


def _run(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    from safetensors.torch import save_file

    batches = read_inputs(folder, request["rows"])
    runtime = load_runtime(None)
    outputs: dict[str, Tensor] = {}

    def execute(module: Any, method: str, row: int) -> None:
        for place, tensor in enumerate(module.run_method(method, batches[row])):
            outputs[f"{row}.{place}"] = tensor.clone().contiguous()

    failed_rows = []
    if "programs" in request:
        for row, path in enumerate(request["programs"]):
            try:
                execute(runtime._load_for_executorch(path), "forward", row)
            except RuntimeError:
                failed_rows.append(row)
    else:
        module = runtime._load_for_executorch(request["path"], request["data"])
        for row in range(len(batches)):
            execute(module, request["method"], row)
    save_file(outputs, folder / "outputs.safetensors")
    return {"failed": failed_rows}


def main(folder: Path) -> int:
    """Answer the request in the folder."""
    return serve(folder, _run)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
