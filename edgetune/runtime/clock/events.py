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
_RECORDED_US = 1.0  # at most, to record one kernel; 0.3 us on a server

Instruction = tuple[str, float, list[tuple[str, float]]]
"""The kernel of a portable operator, or "delegate"; its microseconds; name and microseconds of a delegate's kernels."""

DELEGATE = "delegate"


def record(
    program: Any,
    run: Callable[[tuple[Tensor, ...]], Any],
    calls: Sequence[tuple[Tensor, ...]],
    seconds: float,
    plain_us: Sequence[float],
) -> list[list[Instruction]]:
    """Run each call for about `seconds`, and return its instructions with their times.

    `program` was loaded with `enable_etdump`, and `run` executes it. `plain_us`: the latency of each call without the
    recording, whose own time is taken off every kernel. XNNPACK counts in whole microseconds, rounded down.
    """
    runs = [_run(run, inputs, seconds) for inputs in calls]
    with tempfile.TemporaryDirectory(prefix="edgetune-") as folder:
        path = Path(folder) / "operators.etdp"
        program.write_etdump_result_to_file(str(path))
        blocks = iter([block["events"] for block in _decode(path)["run_data"] if block["name"] == "Execute"])
    answers = []
    for latencies_us, alone_us in zip(runs, plain_us, strict=True):
        recorded = [_instructions(next(blocks)) for _ in latencies_us][_WARM_UPS:]
        slower_us = statistics.median(latencies_us[_WARM_UPS:]) - alone_us
        answers.append(_take_off(_means(recorded), slower_us))
    return answers


def _run(run: Callable[[tuple[Tensor, ...]], Any], inputs: tuple[Tensor, ...], seconds: float) -> list[float]:
    """The latency in microseconds of every run, the warm-ups first."""
    latencies: list[float] = []
    until = time.perf_counter() + seconds
    while len(latencies) < _WARM_UPS + _LEAST_RUNS or (len(latencies) < _MOST_RUNS and time.perf_counter() < until):
        begun = time.perf_counter()
        run(inputs)
        latencies.append((time.perf_counter() - begun) * 1e6)
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
    """The instructions, which are the same in all runs, with their mean times over the middle half of the runs.

    What else the machine did makes some runs slow. The runs are chosen whole, so that the times still add up.
    """
    ordered = sorted(runs, key=lambda run: sum(us for _, us, _ in run))
    cut = len(ordered) // 4
    kept = ordered[cut : len(ordered) - cut]
    return [
        (of[0][0], statistics.fmean(us for _, us, _ in of),
         [(same[0][0], statistics.fmean(us for _, us in same))
          for same in zip(*(kernels for _, _, kernels in of), strict=True)])
        for of in zip(*kept, strict=True)
    ]  # fmt: skip


def _take_off(instructions: Sequence[Instruction], slower_us: float) -> list[Instruction]:
    """The instructions without what recording them took, the same for each kernel and at most a microsecond.

    A delegate loses it once for each of its kernels. XNNPACK takes a kernel's time within that of the record.
    """
    count = sum(max(len(kernels), 1) for _, _, kernels in instructions)
    own_us = min(max(slower_us / max(count, 1), 0.0), _RECORDED_US)
    return [
        (
            name,
            max(us - own_us * max(len(kernels), 1), 0.0),
            [(kernel, max(of - own_us, 0.0)) for kernel, of in kernels],
        )
        for name, us, kernels in instructions
    ]
