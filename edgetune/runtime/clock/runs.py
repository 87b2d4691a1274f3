"""The child process: load a program, run it and time it.

It reads `request.json` and the tensors in `inputs.pt` from its folder, and writes `result.json`. It imports only what
it needs before it measures the memory of the empty process.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import events, machine, power

if TYPE_CHECKING:
    from torch import Tensor

MISSING = "missing"  # the kind of error if a package is not installed
ENVIRONMENT = {"MKL_NUM_THREADS": "1"}
"""What the environment of a process should hold before it imports torch, as the runtime has threads of its own.

Attention calls MKL in each of them, and MKL would start as many again: a prompt then takes twice as long on two cores.
"""


def serve(folder: Path, answer: Callable[[Path, dict[str, Any]], dict[str, Any]]) -> int:
    """Answer the request in `folder`. Returns the exit code."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    try:
        result = answer(folder, request)
    except ImportError as error:
        result = {"error": f"{type(error).__name__}: {error}", "kind": MISSING}
    except Exception as error:  # everything goes to the parent, which raises
        result = {"error": f"{type(error).__name__}: {error}"}
    if "error" in result:
        result = {**result, "versions": versions(), "facts": machine.facts()}
    partial = folder / "result.json.partial"
    partial.write_text(json.dumps(result), encoding="utf-8")
    os.replace(partial, folder / "result.json")
    return 0


def versions() -> dict[str, str]:
    """Versions of the packages that a program needs, if installed."""
    installed = {}
    for name in ("executorch", "torch"):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def answer(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Time each call of the program that the request names; its path is relative to the folder."""
    if request.get("check"):
        return _check_installed()
    threads = int(request["threads"])
    cores = machine.pin(threads)
    calls = read_inputs(folder, request["rows"])
    runtime = load_runtime(threads)
    if request.get("language"):
        load_language_operators()
    empty_mib = machine.resident_mib("VmRSS")
    started = time.perf_counter()
    program, run = _load_method(runtime, folder, request)  # the program must outlive its method
    load_ms = (time.perf_counter() - started) * 1e3
    timed = [_time_call(run, inputs, request) for inputs in calls]
    whole = {
        "threads": int(runtime._threadpool_get_thread_count()),
        "cores": cores,
        "load_ms": load_ms,
        "peak_memory_mib": machine.resident_mib("VmHWM"),
        "empty_memory_mib": empty_mib,
    }
    if request.get("record"):
        del run, program
        latencies_us = [1e3 * statistics.median(call["latencies_ms"]) for call in timed]
        recorded = _record(runtime, folder, request, calls, latencies_us)
        timed = [{**call, "instructions": of} for call, of in zip(timed, recorded, strict=True)]
    return {"calls": [{**call, **whole} for call in timed], "versions": versions(), "facts": machine.facts()}


def _record(
    runtime: Any, folder: Path, request: dict[str, Any], calls: list[tuple[Tensor, ...]], latencies_us: list[float]
) -> list[list[events.Instruction]]:
    """The instructions of each call, by a program that is loaded again to record them."""
    program, run = _load_method(runtime, folder, request, record=True)
    return events.record(program, run, calls, float(request["seconds"]), latencies_us)


def _check_installed() -> dict[str, Any]:
    """What is installed here, without importing it."""
    installed = versions()
    absent = [name for name in ("executorch", "torch") if name not in installed]
    if absent:
        raise ImportError(f"{' and '.join(absent)} not installed")
    return {"versions": installed, "facts": machine.facts()}


def _time_call(
    run: Callable[[tuple[Tensor, ...]], Any], inputs: tuple[Tensor, ...], request: dict[str, Any]
) -> dict[str, Any]:
    def once() -> float:
        begun = time.perf_counter()
        run(inputs)
        return (time.perf_counter() - begun) * 1e3

    timing = time_in_batches(once, request) if "batch_runs" in request else time_runs(once, request)
    return (
        {**timing, **power.energy(once, float(request["energy_seconds"]))} if request.get("energy_seconds") else timing
    )


def load_runtime(threads: int | None) -> Any:
    """executorch's loader, with the quantized kernels registered and the thread pool at its size."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import executorch.kernels.quantized  # noqa: F401  registers embedding_byte and its kin
    import torch  # noqa: F401  first, for its libraries
    from executorch.extension.pybindings import _C

    _name_openvino()
    if threads is not None:
        _C._unsafe_reset_threadpool(threads)
    return _C


def _name_openvino() -> None:
    """Say where OpenVINO's library is, if installed, to the backend that loads it when a program needs it.

    executorch's `portable_lib` does the same, and imports a compiler: 3 s.
    """
    package = importlib.util.find_spec("openvino")
    folders = list(package.submodule_search_locations or []) if package is not None else []
    libraries = [file for folder in folders for file in sorted(Path(folder, "libs").glob("libopenvino_c.so*"))]
    if libraries:
        os.environ.setdefault("OPENVINO_LIB_PATH", str(libraries[0]))


def load_language_operators() -> None:
    """The kernels of attention and cache; importing their module would import a compiler too."""
    import torch

    package = importlib.util.find_spec("executorch.extension.llm.custom_ops")
    folders = list(package.submodule_search_locations or []) if package is not None else []
    libraries = [file for folder in folders for file in Path(folder).glob("*custom_ops_aot_lib.*")]
    if not libraries:
        raise ImportError("this executorch has no kernels for language models")
    torch.ops.load_library(str(libraries[0]))  # type: ignore[no-untyped-call]


def read_inputs(folder: Path, rows: int) -> list[tuple[Tensor, ...]]:
    """The rows in the folder."""
    import torch

    batches: list[tuple[Tensor, ...]] = torch.load(folder / "inputs.pt", weights_only=True) if rows else []
    return batches


def _load_method(
    runtime: Any, folder: Path, request: dict[str, Any], record: bool = False
) -> tuple[Any, Callable[[tuple[Tensor, ...]], Any]]:
    """The program and its method `forward`. Outputs are not cloned, which would time torch and start its threads."""
    path, data = str(folder / request["path"]), request.get("data")
    data = None if data is None else str(folder / data)
    program = runtime._load_program(path, enable_etdump=record, data_path=data)
    method = program.load_method("forward")
    return program, lambda inputs: method.call(inputs, clone_outputs=False)


def time_runs(once: Callable[[], float], request: dict[str, Any]) -> dict[str, Any]:
    """Time the first run, the warm-up and the runs of `once`; the fields are those of `Timing`."""
    first_ms = once()
    warm = _warm_up(once, float(request["warm_up_seconds"]))
    states = [machine.state()]
    latencies: list[float] = []
    until = time.perf_counter() + float(request["seconds"])
    while len(latencies) < 10 or time.perf_counter() < until:
        latencies.append(once())
    states.append(machine.state())
    return {"first_ms": first_ms, "latencies_ms": latencies, "warm_up_runs": warm, "states": states}


def time_in_batches(once: Callable[[], float], request: dict[str, Any]) -> dict[str, Any]:
    """The same by the thermal protocol: batches of warm-ups and runs, with the machine's state around each."""
    first_ms = once()
    states = [machine.state()]
    latencies: list[float] = []
    warm = 0
    until = time.perf_counter() + float(request["seconds"])
    while not latencies or time.perf_counter() < until:
        for _ in range(int(request["batch_warm_ups"])):
            once()
            warm += 1
        latencies += [once() for _ in range(int(request["batch_runs"]))]
        states.append(machine.state())
    return {"first_ms": first_ms, "latencies_ms": latencies, "warm_up_runs": warm, "states": states}


def _warm_up(once: Callable[[], float], seconds: float) -> int:
    until = time.perf_counter() + seconds
    runs: list[float] = []
    while time.perf_counter() < until:
        runs.append(once())
        if len(runs) >= 10:
            before, now = statistics.median(runs[-10:-5]), statistics.median(runs[-5:])
            if abs(before - now) <= 0.05 * now:
                break
    return len(runs)
