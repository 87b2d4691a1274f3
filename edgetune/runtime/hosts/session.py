"""Time many programs on one machine, or measure a program with its manifest there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.ledger import Measured
from edgetune.runtime.hosts.host import Host
from edgetune.runtime.hosts.place import Place, Runner, TimingRequest, parse_place
from edgetune.runtime.hosts.ssh import Ssh
from edgetune.runtime.measure import inputs_of, summarize_timing
from edgetune.runtime.operator_times import layer_times_ms

if TYPE_CHECKING:
    from edgetune.program.artifact import Artifact
    from edgetune.program.manifest import LanguageSpec
    from edgetune.runtime.run import Timing

Progress = Callable[[str, int, int], None]  # current step, how many are done, and the total; 0: unknown


@dataclass(frozen=True)
class Timeable:
    """A program to time, and the inputs of its call."""

    name: str
    path: Path
    inputs: tuple[Tensor, ...]
    data: Path | None = None  # the `.ptd` with its weights, if there is one


def open_runner(
    on: str | Place, *, python: str = "python3", runner: Path | None = None
) -> AbstractContextManager[Runner]:
    """The machine that `on` names (see `place.FORMS`), to be entered.

    `python`: the Python over ssh. `runner`: executorch's `executor_runner` built for Android, which adb takes.
    """
    place = on if isinstance(on, Place) else parse_place(on)
    if runner is not None and place.kind != "adb":
        raise EdgetuneError("--runner only applies to adb", got=str(runner), action="omit --runner, or pass --on adb")
    if place.kind == "ssh":
        return Ssh(place, python=python)
    if place.kind == "adb":
        from edgetune.runtime.hosts.adb import Adb

        return Adb(place, runner)
    return Host()


def time_programs(
    on: str | Runner,
    programs: Iterable[Timeable],
    *,
    threads: int | None = None,
    seconds: float = 0.5,
    python: str = "python3",
    count: int = 0,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Timing | EdgetuneError]]:
    """Time many programs on one machine, one after the other in new processes, over one connection.

    `programs` may be a generator that lowers each program just before it is timed. `threads`: by default all cores
    there. `count`: their number, for `progress`. A program that does not run yields its error; errors of the machine
    (no connection, no runtime) are raised.
    """
    if isinstance(on, str):
        with open_runner(on, python=python) as machine:
            yield from time_programs(
                machine, programs, threads=threads, seconds=seconds, count=count, progress=progress
            )
        return
    for done, program in enumerate(programs):
        if progress is not None:
            progress(program.name, done, count)
        timing: Timing | EdgetuneError
        try:
            wanted = threads if threads is not None else on.cores
            request = TimingRequest(program.path, [program.inputs], wanted, seconds, program.data, energy=False)
            (timing,) = on.time(request)
        except EdgetuneError as error:
            if error.exit_code != Exit.EXPORT:
                raise
            timing = error
        yield program.name, timing


def measure_on(
    machine: Runner,
    artifact: Artifact,
    *,
    threads: int | None = None,
    seconds: float = 2.0,
    by_layer: bool = False,
) -> tuple[Measured, ...]:
    """Time each kind of call there for about `seconds`, with made-up inputs, in the order of the manifest.

    `threads`: by default all cores that a program may use there. `by_layer`: then also each operator, in another
    process, since recording slows a program of many small operators down; adb cannot. Raises `EdgetuneError`.
    """
    threads = threads if threads is not None else machine.cores
    note = machine.caveat(artifact.manifest.versions)
    timings = _time_calls(machine, artifact, threads, seconds)
    calls = artifact.manifest.calls
    pairs = zip(calls, timings, strict=True)
    measured = tuple(summarize_timing(timing, threads, call.label, machine.name, note) for call, timing in pairs)
    if not by_layer:
        return measured
    recorded = _time_calls(machine, artifact, threads, seconds, record=True)
    by_call = [layer_times_ms(timing.instructions, call.executed) for call, timing in zip(calls, recorded, strict=True)]
    pairs_by_call = zip(measured, by_call, strict=True)
    return tuple(one.model_copy(update={"layers_ms": layers_ms}) for one, layers_ms in pairs_by_call)


def _time_calls(
    machine: Runner, artifact: Artifact, threads: int, seconds: float, *, record: bool = False
) -> tuple[Timing, ...]:
    """Each kind of call with made-up inputs, in the order of the manifest."""
    if machine.executorch:
        artifact.check_runtime(machine.executorch, machine.name)
    language = artifact.manifest.language
    rows = [inputs_of(artifact)] if language is None else _prompt_and_token(language)
    request = TimingRequest(
        artifact.path, rows, threads, seconds, artifact.data_path,
        language=language is not None, energy=not record, record=record,
    )  # fmt: skip
    return tuple(reversed(machine.time(request)))  # the prompt is timed first: it fills the cache


def _prompt_and_token(language: LanguageSpec) -> list[tuple[Tensor, ...]]:
    """A call with a piece of a prompt at an empty cache, and one with the token after it, if the cache has room."""
    count = language.prefill_tokens
    following = min(count, language.max_tokens - 1)
    return [
        (torch.ones(1, count, dtype=torch.long), torch.tensor([0])),
        (torch.ones(1, 1, dtype=torch.long), torch.tensor([following])),
    ]
