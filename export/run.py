"""Run and time a program in a process of its own, since a bad `.pte` can take its process down.

`python -m edgetune.export.run FOLDER` is the child's side: it reads `request.json` and `inputs.safetensors` there
and writes `outputs.safetensors` and `result.json`.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from edgetune.technique import EdgetuneError, Exit

_MODULE = "edgetune.export.run"


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

    @property
    def latency_ms(self) -> float:
        """The median."""
        return statistics.median(self.latencies_ms)


def run_in_child(
    path: str | Path, batches: Sequence[tuple[Tensor, ...]], *, method: str = "forward", data: Path | None = None
) -> list[tuple[Tensor, ...]]:
    """Execute a method once for each tuple of inputs, in a child process; returns the outputs of each.

    `data` is the `.ptd` of a program whose weights lie apart. Raises `EdgetuneError` (exit code 5) where the program
    does not load or run, or the child dies.
    """
    outputs: list[dict[int, Tensor]] = [{} for _ in batches]
    request = {"verb": "run", "method": method, "data": _whole(data)}
    _, tensors = ask_child(_MODULE, Path(path), request, batches)
    for key, tensor in tensors.items():
        row, _, place = key.partition(".")
        outputs[int(row)][int(place)] = tensor
    return [tuple(found[place] for place in sorted(found)) for found in outputs]


def time_in_child(
    path: str | Path,
    inputs: tuple[Tensor, ...],
    *,
    threads: int,
    seconds: float,
    warm_up_seconds: float = 1.0,
    data: Path | None = None,
) -> Timing:
    """Load the program in a child process with `threads` threads, warm up, and run it for about `seconds`.

    Warm-up ends when two windows of five runs agree within 5 %, or after `warm_up_seconds`. At least ten runs are
    timed. With a data file the method is loaded by its first run, which `first_ms` then holds. Raises as `run_in_child`
    does.
    """
    request = {
        "verb": "time",
        "threads": threads,
        "seconds": seconds,
        "warm_up_seconds": warm_up_seconds,
        "data": _whole(data),
    }
    result, _ = ask_child(_MODULE, Path(path), request, [inputs])
    return Timing.model_validate(result)


def _whole(path: Path | None) -> str | None:
    return str(path.resolve()) if path is not None else None


def ask_child(
    module: str,
    path: Path,
    request: dict[str, Any],
    batches: Sequence[tuple[Tensor, ...]],
    heard: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Run `python -m module` on a request about the program at `path`: its answer, and the tensors it left.

    `heard` gets each line that the child prints, as it comes.
    """
    from safetensors.torch import load_file, save_file

    rows = {f"{r}.{i}": t.detach().cpu().contiguous().clone() for r, b in enumerate(batches) for i, t in enumerate(b)}
    with tempfile.TemporaryDirectory(prefix="edgetune-") as name:
        folder = Path(name)
        save_file(rows, folder / "inputs.safetensors")
        wanted = {**request, "path": str(path.resolve()), "rows": len(batches)}
        (folder / "request.json").write_text(json.dumps(wanted), encoding="utf-8")
        done = _ended(module, folder, heard)
        answer = folder / "result.json"
        result = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else None
        if done.returncode != 0 or result is None or "error" in result:
            raise failed(path, done, result)
        saved = folder / "outputs.safetensors"
        return result, load_file(saved) if saved.is_file() else {}


def _ended(module: str, folder: Path, heard: Callable[[str], None]) -> subprocess.CompletedProcess[str]:
    """The child's side, run to its end. Its working directory is the folder: nothing there can shadow a package."""
    with (
        (folder / "stderr").open("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
        ) as child,
    ):
        try:
            assert child.stdout is not None
            for line in child.stdout:
                heard(line)
            code = child.wait()
        finally:  # interrupted, or the listener raised
            child.kill()
        errors.seek(0)
        return subprocess.CompletedProcess(child.args, code, "", errors.read())


def failed(path: Path, done: subprocess.CompletedProcess[str], result: dict[str, Any] | None) -> EdgetuneError:
    """Why a child ended without an answer."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if result is not None and "error" in result:
        said = [line for line in lines if "issing operator" in line or "not registered" in line or "[E" in line[:4]]
        what = "; ".join(dict.fromkeys([str(result["error"]), *said[:5]]))
    elif done.returncode < 0:
        what = f"the process that ran it was ended by {_signal(-done.returncode)}"
    else:
        what = f"the process that ran it ended with code {done.returncode}: {' '.join(lines[-3:])[:500]}"
    return EdgetuneError(
        f"the program does not run: {what}",
        where=str(path),
        action="export it again with the installed executorch version; a .pte of another one may not load",
        exit_code=Exit.EXPORT,
    )


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# The child's side. Only what it needs is imported before the empty process's memory is read.


def serve(folder: Path, answer: Callable[[Path, dict[str, Any]], dict[str, Any]]) -> int:
    """Answer the request in `folder`. Returns the exit code."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    try:
        result = answer(folder, request)
    except Exception as error:  # everything goes to the parent, which raises
        result = {"error": f"{type(error).__name__}: {error}"}
    partial = folder / "result.json.partial"
    partial.write_text(json.dumps(result), encoding="utf-8")
    os.replace(partial, folder / "result.json")
    return 0


def _answer(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    return _time(folder, request) if request["verb"] == "time" else _run(folder, request)


def loaded_runtime(threads: int | None) -> Any:
    """executorch's loader, with the quantized kernels registered and the thread pool at its size."""
    import executorch.kernels.quantized  # noqa: F401  registers embedding_byte and its kin
    from executorch.extension.pybindings import (
        _portable_lib,
        portable_lib,  # noqa: F401  finds OpenVINO's library beside its package
    )

    if threads is not None:
        _portable_lib._unsafe_reset_threadpool(threads)
    return _portable_lib


def inputs_in(folder: Path, rows: int) -> list[tuple[Tensor, ...]]:
    """The rows that were left in the folder for the child."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "inputs.safetensors")
    found: list[dict[int, Tensor]] = [{} for _ in range(rows)]
    for key, tensor in tensors.items():
        row, _, place = key.partition(".")
        found[int(row)][int(place)] = tensor
    return [tuple(row[place] for place in sorted(row)) for row in found]


def _run(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    from safetensors.torch import save_file

    batches = inputs_in(folder, request["rows"])
    module = loaded_runtime(None)._load_for_executorch(request["path"], request["data"])
    outputs = {}
    for row, inputs in enumerate(batches):
        for place, tensor in enumerate(module.run_method(request["method"], inputs)):
            outputs[f"{row}.{place}"] = tensor.clone().contiguous()
    save_file(outputs, folder / "outputs.safetensors")
    return {}


def _time(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    threads = int(request["threads"])
    (inputs,) = inputs_in(folder, 1)
    runtime = loaded_runtime(threads)
    empty_mib = resident_mib("VmRSS")
    started = time.perf_counter()
    run = _loaded(runtime, request)
    load_ms = (time.perf_counter() - started) * 1e3

    def once() -> float:
        begun = time.perf_counter()
        run(inputs)
        return (time.perf_counter() - begun) * 1e3

    return {
        "threads": threads,
        "load_ms": load_ms,
        **timings(once, request),
        "peak_memory_mib": resident_mib("VmHWM"),
        "empty_memory_mib": empty_mib,
    }


def _loaded(runtime: Any, request: dict[str, Any]) -> Callable[[tuple[Tensor, ...]], Any]:
    """The method `forward`, loaded and ready to be called.

    A clone of the outputs would be torch's work, not the program's, and start threads of its own.
    """
    if request["data"] is not None:  # which only a module takes: it loads a method at its first execution
        module = runtime._load_for_executorch(request["path"], request["data"])
        return lambda inputs: module.run_method("forward", inputs, clone_outputs=False)
    program = runtime._load_program(request["path"])
    method = program.load_method("forward")

    def call(inputs: tuple[Tensor, ...]) -> Any:
        assert program is not None  # it must outlive its method
        return method.call(inputs, clone_outputs=False)

    return call


def timings(once: Callable[[], float], request: dict[str, Any]) -> dict[str, Any]:
    """The first run, the warm-up and the timed runs of what `once` does and times, as `Timing` names them."""
    first_ms = once()
    warm = _warm_up(once, float(request["warm_up_seconds"]))
    latencies: list[float] = []
    until = time.perf_counter() + float(request["seconds"])
    while len(latencies) < 10 or time.perf_counter() < until:
        latencies.append(once())
    return {"first_ms": first_ms, "latencies_ms": latencies, "warm_up_runs": warm}


def _warm_up(once: Any, seconds: float) -> int:
    until = time.perf_counter() + seconds
    runs: list[float] = []
    while time.perf_counter() < until:
        runs.append(once())
        if len(runs) >= 10:
            before, now = statistics.median(runs[-10:-5]), statistics.median(runs[-5:])
            if abs(before - now) <= 0.05 * now:
                break
    return len(runs)


def resident_mib(field: str) -> float:
    """Resident memory of this process, `VmRSS` now or `VmHWM` at its peak.

    Linux only counts a process's own peak there: `ru_maxrss` also carries the parent's over the fork.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


if __name__ == "__main__":
    sys.exit(serve(Path(sys.argv[1]), _answer))
