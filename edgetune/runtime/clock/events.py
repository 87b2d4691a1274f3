"""The time of each operator of a call, as the runtime records it (ETDump)."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_WARM_UPS, _LEAST_RUNS, _MOST_RUNS = 3, 10, 200

Instruction = tuple[str, float, list[tuple[str, float]]]
"""The kernel of a portable operator, or "delegate"; its microseconds; name and microseconds of a delegate's kernels."""

DELEGATE = "delegate"


def record(
    program: Any, run: Callable[[tuple[Tensor, ...]], Any], calls: Sequence[tuple[Tensor, ...]], seconds: float
) -> list[dict[str, Any]]:
    """Run each call for about `seconds`: its latencies, and its instructions with their mean times.

    `program` was loaded with `enable_etdump`, and `run` executes it. XNNPACK counts the times of its kernels in whole
    microseconds, rounded down.
    """
    latencies = [_run(run, inputs, seconds) for inputs in calls]
    with tempfile.TemporaryDirectory(prefix="edgetune-") as folder:
        path = Path(folder) / "operators.etdp"
        program.write_etdump_result_to_file(str(path))
        blocks = iter([block["events"] for block in _decode(path)["run_data"] if block["name"] == "Execute"])
    answers = []
    for of_call in latencies:
        runs = [_instructions(next(blocks)) for _ in of_call][_WARM_UPS:]
        steady = {"first_ms": of_call[0], "latencies_ms": of_call[_WARM_UPS:], "warm_up_runs": _WARM_UPS}
        answers.append({**steady, "instructions": _means(runs)})
    return answers


def _run(run: Callable[[tuple[Tensor, ...]], Any], inputs: tuple[Tensor, ...], seconds: float) -> list[float]:
    """The latency in milliseconds of every run, the warm-ups first."""
    latencies: list[float] = []
    until = time.perf_counter() + seconds
    while len(latencies) < _WARM_UPS + _LEAST_RUNS or (len(latencies) < _MOST_RUNS and time.perf_counter() < until):
        begun = time.perf_counter()
        run(inputs)
        latencies.append((time.perf_counter() - begun) * 1e3)
    return latencies


def _decode(path: Path) -> Any:
    """The record as JSON, by the compiler and the schemas in executorch's wheel.

    Its developer tools, which do the same, take seconds to import and need further packages.
    """
    tools, schemas = (_folder_of(*parts) for parts in (("data", "bin"), ("devtools", "etdump")))
    options = ["--json", "--strict-json", "--defaults-json", "--size-prefixed", "-o", str(path.parent)]
    command = [str(tools / "flatc"), *options, str(schemas / "etdump_schema_flatcc.fbs"), "--", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def _folder_of(*parts: str) -> Path:
    """A folder of executorch's. To look for it as a package would import those above it, a compiler among them."""
    spec = importlib.util.find_spec("executorch")
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec is not None else []
    folders = [folder for root in roots if (folder := root.joinpath(*parts)).is_dir()]
    if not folders:
        raise ImportError(f"this executorch has no {'/'.join(parts)}")
    return folders[0]


def _instructions(events: Sequence[dict[str, Any]]) -> list[Instruction]:
    """The instructions of one run, in order. Each is recorded after the kernels that it called."""
    instructions: list[Instruction] = []
    portable, kernels = "", []
    for event in (event["profile_event"] for event in events if "profile_event" in event):
        name, kernel = event.get("name") or "", event.get("delegate_debug_id_str")
        us = (event["end_time"] - event["start_time"]) / 1e3
        if kernel:
            kernels.append((kernel, us))
        elif name.startswith("native_call_"):
            portable = portable or name.removeprefix("native_call_")
        elif name in ("OPERATOR_CALL", "DELEGATE_CALL"):
            instructions.append((DELEGATE if name == "DELEGATE_CALL" else portable, us, kernels))
            portable, kernels = "", []
    return instructions


def _means(runs: Sequence[list[Instruction]]) -> list[Instruction]:
    """The instructions, which are the same in all runs, each time the mean of the middle half of the runs."""
    return [
        (of[0][0], _mean([us for _, us, _ in of]),
         [(same[0][0], _mean([us for _, us in same])) for same in zip(*(kernels for _, _, kernels in of), strict=True)])
        for of in zip(*runs, strict=True)
    ]  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    """The mean of the middle half: what else the machine did makes some runs slow."""
    ordered, cut = sorted(values), len(values) // 4
    return statistics.fmean(ordered[cut : len(ordered) - cut])
