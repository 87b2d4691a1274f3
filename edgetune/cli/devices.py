"""`edgetune devices`: descriptors of phones and boards, their calibration, and predictions from them."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgetune.cli.complete import device_names

PLAIN: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None, "add_completion": False}
Json = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]
devices = typer.Typer(help="List, compare and calibrate phones and boards.", **PLAIN)


def print_result(value: object) -> None:
    """Print text as it is, anything else as JSON."""
    print(value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False, default=str))


def terminal_width() -> int | None:
    """Columns of the terminal; `None` if stdout is a file or a pipe, which has no limit."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


@devices.command("list")
def devices_list(as_json: Json = False) -> int:
    """List all devices by family."""
    from dataclasses import asdict

    from edgetune.profile.listing import format_entries, list_entries

    entries = list_entries()
    print_result([asdict(entry) for entry in entries] if as_json else format_entries(entries))
    return 0


@devices.command("show")
def devices_show(
    device_id: Annotated[
        str, typer.Argument(metavar="ID", help="A device id, or a path ending in .yaml.", autocompletion=device_names)
    ],
    as_json: Json = False,
) -> int:
    """Print a descriptor: every number, its source and trust."""
    from edgetune.profile.device import load
    from edgetune.profile.listing import describe_device

    device = load(device_id)
    print_result(device.model_dump(mode="json", exclude_unset=True) if as_json else describe_device(device))
    return 0


@devices.command("add")
def devices_add(
    source: Annotated[
        str, typer.Argument(metavar="FILE.yaml|NAME", help="A descriptor; with --like, the name of the new device.")
    ],
    like: Annotated[str | None, typer.Option(metavar="ID", help="Write a copy of this device for you to edit.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite your own device of the same name.")] = False,
    as_json: Json = False,
) -> int:
    """Check a descriptor and add it to your devices.

    With --like, start from a copy of an existing device.
    """
    from edgetune.profile.adding import add, copy

    path = add(Path(source), replace=replace) if like is None else copy(like, source, replace=replace)
    copied = f"{path}: a copy of {like}; edit it: every source is marked as copied"
    print_result({"id": path.stem, "path": str(path)} if as_json else f"{path}: added" if like is None else copied)
    return 0


@devices.command("validate")
def devices_validate(
    paths: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Ids or paths; default: all.")] = None,
    as_json: Json = False,
) -> int:
    """Check descriptors, and predictions against measurements.

    All errors are printed. Without IDs, this checks all descriptors and compares predictions with published
    measurements. Each row is predicted without data from its device, then again with one row of that device.
    """
    from edgetune.core.errors import EdgetuneError, Exit
    from edgetune.core.places import raise_all
    from edgetune.profile import device
    from edgetune.profile.validate import format_lines, to_json, validate
    from edgetune.recipe.names import device_ids

    errors: list[EdgetuneError] = []
    valid: dict[str, device.Device] = {}
    for name in paths or device_ids():
        try:
            described = device.load(name)
            valid[described.id] = described
        except EdgetuneError as error:
            errors.append(error)
    validation = None if paths or errors else validate(valid)
    if as_json:
        print_result({"valid": list(valid), "errors": [str(error) for error in errors], **to_json(validation)})
        return int(Exit.USAGE) if errors else 0
    raise_all("devices", errors)
    print_result(f"valid: {', '.join(valid)}")
    if validation is not None:
        print_result("\n".join(format_lines(validation)))
    return 0


@devices.command("calibrate")
def devices_calibrate(
    device_id: Annotated[
        str, typer.Argument(metavar="[ID]", help="Id of another device; default: this host.")
    ] = "host",
    on: Annotated[str | None, typer.Option("--on", help="Address of the device: ssh://user@host.")] = None,
    table: Annotated[
        Path | None, typer.Option("--from", help="CSV file with your own measurements of the device.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Descriptor to write, for this host.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Default: all cores if their timings are repeatable.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Time only a few programs; predictions will be poor.")] = False,
    as_json: Json = False,
) -> int:
    """Time a machine, and fit the predictor to it.

    This times programs operator by operator, in about six minutes on 2 cores. An interrupted calibration continues
    where it stopped.
    """
    from edgetune.cli.progress import show_progress
    from edgetune.core.errors import EdgetuneError
    from edgetune.profile import calibrate
    from edgetune.profile.calibration import calibration_path
    from edgetune.recipe.names import HOST, SUFFIX, user_folder

    elsewhere = device_id != HOST
    if elsewhere == (on is None and table is None) or (on is not None and table is not None):
        action = "give a device with either --on or --from; omit all three for this host"
        raise EdgetuneError("it is not clear what to calibrate", got=device_id, action=action)
    if elsewhere and out is not None:
        raise EdgetuneError("--out only applies to this host", got=str(out), action="omit --out")
    with show_progress() as progress, contextlib.redirect_stdout(sys.stderr):
        if table is not None:
            calibration = calibrate.calibrate_from(table, device_id, threads=threads)
        elif on is not None:
            calibration = calibrate.calibrate_on(on, device_id, threads=threads, quick=quick, progress=progress)
        else:
            described = calibrate.calibrate(out, threads=threads, quick=quick, progress=progress)
            assert described.calibration is not None
            calibration = described.calibration
    path = calibration_path(out or user_folder() / (device_id + SUFFIX))
    text = (
        f"{path}: {calibration.threads} threads, {calibration.programs} programs; on {calibration.networks} networks "
        f"that were not used in the fit, the error is {calibration.error_pct:g} % (median) and "
        f"{calibration.error_p90_pct:g} % (90th percentile)"
    )
    print_result(
        {"path": str(path), **calibration.model_dump(mode="json")} if as_json else "\n".join([text, *calibration.notes])
    )
    return 0


@devices.command("compare")
def devices_compare(
    program: Annotated[Path, typer.Argument(metavar="MODEL.pte", help="A .pte with its model.json beside it.")],
    devices: Annotated[str | None, typer.Option(metavar="A,B,C", help="Ids or paths; default: all.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write an HTML page with a chart.")] = None,
    as_json: Json = False,
) -> int:
    """Predict a program for every device, side by side.

    Shows latency, memory, energy, cold start, and whether the program fits.
    """
    from edgetune.report.compare import compare, text, to_json_values

    names = None if devices is None else [name.strip() for name in devices.split(",") if name.strip()]
    comparison = compare(program, names)
    if html is not None:
        from edgetune.report.compare_page import page

        page(comparison, html)
        print(f"page: {html}", file=sys.stderr)
    print_result(to_json_values(comparison) if as_json else text(comparison, terminal_width()))
    return 0
