"""Reach a machine, and measure a program with its manifest there."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgetune.core.errors import EdgetuneError
from edgetune.core.ledger import Measured
from edgetune.runtime.hosts.host import Host
from edgetune.runtime.hosts.place import Place, Runner, TimingRequest, parse_place
from edgetune.runtime.hosts.ssh import Ssh
from edgetune.runtime.measure import inputs_of, summarize_timing
from edgetune.runtime.operator_times import layer_times_ms

if TYPE_CHECKING:
    from edgetune.program.artifact import Artifact
    from edgetune.program.manifest import Call, LanguageSpec
    from edgetune.runtime.run import Timing


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


def measure_on(
    machine: Runner,
    artifact: Artifact,
    *,
    threads: int | None = None,
    seconds: float = 2.0,
    by_layer: bool = False,
) -> tuple[Measured, ...]:
    """Time each kind of call there for about `seconds`, with made-up inputs, in the order of the manifest.

    `threads`: by default all cores that a program may use there. `by_layer`: then also each operator, in runs of its
    own, since recording slows a program of many small operators down; adb cannot. Raises `EdgetuneError`.
    """
    threads = threads if threads is not None else machine.cores
    note = machine.caveat(artifact.manifest.versions)
    timings = _time_calls(machine, artifact, threads, seconds, record=by_layer)
    calls = artifact.manifest.calls
    measured = tuple(
        summarize_timing(timing, threads, call.label, machine.name, note)
        for call, timing in zip(calls, timings, strict=True)
    )
    if not by_layer:
        return measured
    return tuple(_with_layers(one, call, timing) for one, call, timing in zip(measured, calls, timings, strict=True))


def _with_layers(measured: Measured, call: Call, recorded: Timing) -> Measured:
    """The measurement with its layers, or with a note why there are none."""
    try:
        return measured.model_copy(update={"layers_ms": layer_times_ms(recorded.instructions, call.executed)})
    except EdgetuneError as error:
        note = "; ".join(filter(None, (measured.note, f"not measured by layer: {error}")))
        return measured.model_copy(update={"note": note})


def _time_calls(
    machine: Runner, artifact: Artifact, threads: int, seconds: float, *, record: bool
) -> tuple[Timing, ...]:
    """Each kind of call with made-up inputs, in the order of the manifest."""
    if machine.executorch:
        artifact.check_runtime(machine.executorch, machine.name)
    language = artifact.manifest.language
    rows = [inputs_of(artifact)] if language is None else _prompt_and_token(artifact, language)
    adapters = artifact.manifest.adapters
    adapter = adapters.files[0].name if adapters is not None and adapters.form == "files" else None
    with artifact.data_for(adapter) as data:
        request = TimingRequest(
            artifact.path, rows, threads, seconds, data,
            language=language is not None, record=record,
        )  # fmt: skip
        return tuple(reversed(machine.time(request)))  # the prompt is timed first: it fills the cache


def _prompt_and_token(artifact: Artifact, language: LanguageSpec) -> list[tuple[Tensor, ...]]:
    """A call with a piece of a prompt at an empty cache, and one with the token after it, if the cache has room."""
    count = language.prefill_tokens
    following = min(count, language.max_tokens - 1)
    rows = [
        (torch.ones(1, count, dtype=torch.long), torch.tensor([0])),
        (torch.ones(1, 1, dtype=torch.long), torch.tensor([following])),
    ]
    return [artifact.with_adapter(row, None) for row in rows]
