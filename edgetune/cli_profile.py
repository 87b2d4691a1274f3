"""`edgetune profile`: what a program costs on a device, predicted, and measured where it can be run."""

from __future__ import annotations

import contextlib
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetune.cli_complete import device_names
from edgetune.cli_devices import Json, printed

if TYPE_CHECKING:
    from edgetune.export.artifact import Artifact
    from edgetune.export.language.artifact import LanguageArtifact
    from edgetune.ledger import Measured


def profile(
    program: Annotated[Path, typer.Argument(help="A .pte with its model.json beside it.")],
    device: Annotated[str, typer.Option(help="A device id, or a path ending in .yaml.", autocompletion=device_names)],
    on: Annotated[
        str, typer.Option(metavar="PLACE", help="Where to time it: host, ssh://user@host[:port] or adb[:serial].")
    ] = "host",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Default: here all cores, elsewhere those of the device.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="To time each kind of call, at least.")] = 2.0,
    python: Annotated[
        str, typer.Option(help="Over ssh: the Python there that has executorch; a path begins at home.")
    ] = "python3",
    runner: Annotated[
        Path | None, typer.Option(help="Over adb: executorch's executor_runner, built for Android.")
    ] = None,
    by_layer: Annotated[bool, typer.Option("--layers", help="Also what bounds each layer, predicted.")] = False,
    as_json: Json = False,
) -> int:
    """Predict what a program costs on a device, or measure it."""
    from edgetune.export.language.artifact import load_any
    from edgetune.profile.calls import predicted_calls
    from edgetune.profile.device import HOST, load
    from edgetune.profile.layers import layers, plain, text
    from edgetune.profile.runners.place import parsed

    place = parsed(on)
    artifact, described = load_any(program), load(device)
    if threads is None and (described.id == HOST or place.kind != "host"):
        threads = described.thread_count
    predicted = predicted_calls(artifact, described)
    with contextlib.redirect_stdout(sys.stderr):
        measured = _measured(artifact, on, threads, seconds, python, runner)
    calls: list[dict[str, Any]] = [
        {"predicted": p.model_dump(mode="json"), "measured": m.model_dump(mode="json") if m else None}
        for p, m in itertools.zip_longest(predicted, measured)
    ]
    found = layers(artifact, described) if by_layer else ()
    for call, of in zip(calls, found):  # noqa: B905  none without --layers
        call["layers"] = plain(of)
    if as_json:  # of a language program: one token, and under "prompt" a piece of a prompt
        printed(calls[0] if len(calls) == 1 else {**calls[0], "prompt": calls[1]})
        return 0
    for call in calls:
        printed(f"predicted: {_pairs(call['predicted'])}")
        printed(f"measured: {_pairs(call['measured']) if call['measured'] else 'this machine cannot run it'}")
    for of in found:
        printed("\n" + text(of))
    return 0


def _measured(
    artifact: Artifact | LanguageArtifact,
    on: str,
    threads: int | None,
    seconds: float,
    python: str,
    runner: Path | None,
) -> tuple[Measured, ...]:
    """Timed there; nothing where that is this host, and it cannot run the target."""
    from edgetune.export.targets import find
    from edgetune.profile.runners.session import measured_on, opened

    with opened(on, python=python, runner=runner) as machine:
        if on == "host" and not find(artifact.manifest.target).runs_here:
            return ()
        return measured_on(machine, artifact, threads=threads, seconds=seconds)


def _pairs(values: dict[str, Any]) -> str:
    """What is known, in one line."""
    known = {key: value for key, value in values.items() if value not in ("", None, [])}
    return ", ".join(f"{key} {_shown(value)}" for key, value in known.items())


def _shown(value: object) -> str:
    if isinstance(value, list):
        return " to ".join(map(_shown, value)) if all(isinstance(item, float) for item in value) else str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
