"""Build and time micro-programs in child processes, and keep them until the calibration is finished.

`edgetune.export.build_microbenchmarks` builds them: a program as `NAME.pte`, its inputs as `NAME.pt` and its
operators as `NAME.json`; timings are appended to `timings-HOST.jsonl`, so that an interrupted calibration can continue.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.files import write_atomically
from edgetune.core.progress import Progress
from edgetune.data.dataset import cache_folder
from edgetune.profile import micro
from edgetune.profile.micro.program import Micro
from edgetune.program.operators import Operator
from edgetune.runtime.clock.events import Instruction
from edgetune.runtime.clock.machine import usable_cores

_BUILDERS = 2  # processes: a compiler takes a gigabyte
TIMINGS = f"timings-{platform.node() or 'here'}.jsonl"  # several machines may share the folder


def trials(quick: bool) -> tuple[Micro, ...]:
    """All programs of a calibration; a few of each kind if it is quick."""
    return micro.quick() if quick else micro.programs()


def folder_for(quick: bool) -> Path:
    """The folder of the programs, by their names and by the versions that build them."""
    names = [trial.name for trial in trials(quick)]
    packages = ("edgetune", "executorch", "torch", "torchao")
    parts = [*names, *(importlib.metadata.version(package) for package in packages)]
    return cache_folder() / "calibrate" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def forget(folder: Path) -> None:
    """Remove programs and timings: half a gigabyte."""
    shutil.rmtree(folder, ignore_errors=True)


# Building


def build(folder: Path, quick: bool, progress: Progress = lambda *_: None) -> list[str]:
    """Build what is missing. Returns the programs that cannot be built, with the reason."""
    wanted = trials(quick)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [trial.name for trial in wanted if not is_built(folder, trial.name)]
    done = len(wanted) - len(missing)
    failed: list[str] = []
    builders = min(_BUILDERS, usable_cores(), len(missing))
    answers: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
    with ThreadPoolExecutor(max(builders, 1)) as pool:
        commands = [[str(folder), str(part), str(builders), "quick" if quick else "all"] for part in range(builders)]
        jobs = [pool.submit(_follow, "edgetune.export.build_microbenchmarks", command, answers) for command in commands]
        waiting = len(jobs)
        while waiting:
            answer = answers.get()
            if answer is None:  # one of them has ended
                waiting -= 1
                continue
            done += 1
            progress("build", done, len(wanted), "")
            if "error" in answer:
                failed.append(f"{answer['name']}: {answer['error']}")
        problems = [problem for job in jobs if (problem := job.result())]
    reported = {line.partition(":")[0] for line in failed}
    lost = [name for name in missing if not is_built(folder, name) and name not in reported]
    if lost:
        why = f": {problems[0]}" if problems else ""
        action = "run it again: it continues where it stopped"
        raise EdgetuneError(f"{len(lost)} micro-programs were not built{why}", action=action, exit_code=Exit.EXPORT)
    return failed


def _follow(module: str, arguments: list[str], answers: SimpleQueue[dict[str, Any] | None]) -> str:
    """Pass on the JSON lines that a child prints, then `None`. Returns how it failed, or an empty text."""
    command = [sys.executable, "-m", module, *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, errors="replace") as child:
        assert child.stdout is not None
        assert child.stderr is not None
        with ThreadPoolExecutor(1) as aside:
            errors = aside.submit(child.stderr.read)
            for line in child.stdout:
                if line.startswith("{"):
                    answers.put(json.loads(line))
            code = child.wait()
            answers.put(None)
            return "" if code == 0 else f"the process ended with code {code}: {' '.join(errors.result().split()[-40:])}"


def is_built(folder: Path, name: str) -> bool:
    """Whether a program of this name is complete."""
    return (folder / f"{name}.json").is_file()  # written last


def operators_of(folder: Path, name: str) -> tuple[Operator, ...]:
    """The operators of a built program."""
    records = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return tuple(Operator.model_validate(operator, strict=False) for operator in records)


# Timing


@dataclass(frozen=True)
class Clocked:
    """One timing of a program, and the instructions of a run if they were recorded."""

    name: str
    us: float
    load_ms: float
    instructions: tuple[Instruction, ...] = ()

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Clocked:
        """From what the timing process printed."""
        instructions = tuple(
            (str(name), float(us), [(str(kernel), float(own_us)) for kernel, own_us in kernels])
            for name, us, kernels in answer["instructions"]
        )
        return cls(answer["name"], float(answer["us"]), float(answer["load_ms"]), instructions)


def clock(
    folder: Path,
    names: Sequence[str],
    *,
    threads: int,
    seconds: float,
    rounds: int,
    progress: Progress = lambda *_: None,
) -> tuple[list[Clocked], list[str]]:
    """Time all programs once per round. Returns the timings, and the programs that do not run with the reason.

    Rounds are far apart, because a machine that others use is slow for minutes at a time.
    """
    kept = list(_read_timings(folder, threads))
    failed: dict[str, str] = {}
    total, done = rounds * len(names), 0
    for number in range(rounds):
        had = [sum(one.name == name for one in kept) for name in names]
        waiting = [name for name, times in zip(names, had, strict=True) if times <= number and name not in failed]
        done = (number + 1) * len(names) - len(waiting)
        for answer in _time_each(folder, waiting, threads, seconds) if waiting else ():
            if "error" in answer:
                failed[answer["name"]] = answer["error"]
            else:
                kept.append(Clocked.of(answer))
            done += 1
            progress("time", done, total, "")
    return kept, [f"{name}: {why}" for name, why in failed.items()]


def _read_timings(folder: Path, threads: int) -> Iterator[Clocked]:
    """The timings from before this calibration was interrupted."""
    path = folder / TIMINGS
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            timing = json.loads(line)
            if timing["threads"] == threads:
                yield Clocked.of(timing)
        except (ValueError, KeyError, TypeError):
            continue  # the line that was being written


def _time_each(folder: Path, names: Sequence[str], threads: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Time programs in a child process, and yield its answers."""
    request = {"threads": threads, "seconds": seconds, "names": list(names)}
    write_atomically(folder / "request.json", json.dumps(request))
    command = [sys.executable, "-m", "edgetune.runtime.clock.many", str(folder)]
    with (
        (folder / TIMINGS).open("a", encoding="utf-8") as log,
        (folder / "stderr").open("w", encoding="utf-8") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace") as child,
    ):
        try:
            assert child.stdout is not None
            for line in child.stdout:
                answer = json.loads(line) if line.startswith("{") else {}
                if answer.get("state") == "done":
                    print(json.dumps({**answer, "threads": threads}), file=log, flush=True)
                if answer:
                    yield answer
            code = child.wait()
        finally:
            child.kill()
    if code != 0:
        last = (folder / "stderr").read_text(encoding="utf-8", errors="replace").split()[-40:]
        message = f"the micro-programs could not be timed, code {code}: {' '.join(last)}"
        raise EdgetuneError(message, exit_code=Exit.EXPORT)
