"""`edgetune profile`: predict or measure the latency and memory of a program on a device."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetune.cli.complete import device_names
from edgetune.cli.devices import Json, print_result

if TYPE_CHECKING:
    from edgetune.core.ledger import Layers, Measured, Predicted
    from edgetune.profile.tables import Pair
    from edgetune.program.artifact import Artifact


def profile(
    program: Annotated[Path, typer.Argument(help="An exported .pte; needs its model.json.")],
    device: Annotated[
        str | None,
        typer.Option(
            help="A device id, or a path ending in .yaml. Default: this host, where the program is then also timed.",
            autocompletion=device_names,
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also time the program, on this host or where --on says.")
    ] = False,
    on: Annotated[
        str | None,
        typer.Option(metavar="PLACE", help="Where to time it: host, ssh://user@host[:port] or adb[:serial]."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Default: all cores on this host, else the threads of the descriptor.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Minimum time to measure each kind of call.")] = 2.0,
    python: Annotated[
        str, typer.Option(help="Over ssh: a Python with executorch; a path is relative to the home folder.")
    ] = "python3",
    runner: Annotated[
        Path | None, typer.Option(help="Over adb: ExecuTorch's executor_runner, built for Android.")
    ] = None,
    by_layer: Annotated[
        bool, typer.Option("--layers", help="Also each layer: its time, and what it is bound by.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Predict or measure latency and memory on a device.

    The prediction is for the CPU of the device. With --device nothing is timed without --measure or --on.
    """
    from edgetune.profile.calls import predict_calls
    from edgetune.profile.device import load
    from edgetune.profile.layers import measured_text, predict_layers
    from edgetune.profile.layers import text as layers_text
    from edgetune.profile.tables import text
    from edgetune.program.artifact import Artifact
    from edgetune.recipe.names import HOST, device_ids
    from edgetune.runtime.hosts.place import parse_place

    place = parse_place(on or HOST) if measure or on or device is None else None
    artifact = Artifact.load(program, "model", "language")
    described = load(device or HOST) if device is not None or HOST in device_ids() else None
    if described is not None and place is not None and threads is None:
        threads = described.thread_count if described.id == HOST or place.kind != "host" else None
    predicted: tuple[Predicted | None, ...] = (None,) * len(artifact.manifest.calls)
    measured: tuple[Measured | None, ...] = (None,) * len(predicted)
    layers: tuple[Layers, ...] = ()
    if described is not None:
        predicted = predict_calls(artifact, described)
        layers = predict_layers(artifact, described) if by_layer else ()
    if place is not None:
        with contextlib.redirect_stdout(sys.stderr):
            measured = _measure(artifact, on or HOST, threads, seconds, python, runner, by_layer)
    pairs = tuple(zip(predicted, measured, strict=True))
    if as_json:  # of a language program: one token, and under "prompt" a piece of a prompt
        print_result(_as_json(pairs, layers))
        return 0
    summary = artifact.program()
    print_result(text(f"{artifact.path.name}: {summary.target}, {summary.size_mib:,.1f} MiB", pairs))
    for of, timed in zip(layers, measured):  # noqa: B905  none without --layers
        print_result("\n" + layers_text(of, timed))
    for timed in measured:
        if timed is not None and timed.layers_ms and not layers:
            print_result("\n" + measured_text(timed))
    return 0


def _as_json(pairs: tuple[Pair, ...], layers: tuple[Layers, ...]) -> dict[str, Any]:
    calls: list[dict[str, Any]] = [
        {"predicted": p and p.model_dump(mode="json"), "measured": m and m.model_dump(mode="json")} for p, m in pairs
    ]
    for call, of in zip(calls, layers):  # noqa: B905  none without --layers
        call["layers"] = of.model_dump(mode="json", include={"layers", "other", "calls_ms", "bounds_pct"})
    return calls[0] if len(calls) == 1 else {**calls[0], "prompt": calls[1]}


def _measure(
    artifact: Artifact,
    on: str,
    threads: int | None,
    seconds: float,
    python: str,
    runner: Path | None,
    by_layer: bool,
) -> tuple[Measured, ...]:
    """Time the program. Raises if that is on this host, which cannot run the target."""
    from edgetune.core.errors import EdgetuneError, Exit
    from edgetune.export.targets import find
    from edgetune.runtime.hosts.session import measure_on, open_runner

    target = artifact.manifest.target
    if on == "host" and not find(target).runs_here:
        action = "pass --device for a prediction alone, or --on ssh://user@host"
        raise EdgetuneError(f"this machine cannot run {target} programs", action=action, exit_code=Exit.EXPORT)
    with open_runner(on, python=python, runner=runner) as machine:
        return measure_on(machine, artifact, threads=threads, seconds=seconds, by_layer=by_layer)
