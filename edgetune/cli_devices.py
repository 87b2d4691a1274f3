"""`edgetune devices`: what is known of phones and boards, and how far predictions from it can be trusted."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from edgetune.profile.validate import Compared

PLAIN: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None, "add_completion": False}
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
devices = typer.Typer(help="Device descriptors: what is known of a phone or board, and from where.", **PLAIN)


def printed(value: object) -> None:
    """Text as it is; anything else as JSON."""
    print(value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False, default=str))


@devices.command("list")
def devices_list(as_json: Json = False) -> int:
    """List the devices that are known here."""
    from edgetune.profile import device

    found = [device.load(name) for name in device.ids()]
    plain = [{"id": d.id, "name": d.name, "soc": d.soc, "calibrated": d.calibration is not None} for d in found]
    lines = [f"{d.id:<18} {d.name}, {d.soc}{', calibrated' if d.calibration else ''}" for d in found]
    printed(plain if as_json else "\n".join(lines))
    return 0


@devices.command("show")
def devices_show(
    device_id: Annotated[str, typer.Argument(metavar="ID", help="A device id, or a path ending in .yaml.")],
    as_json: Json = False,
) -> int:
    """Print a descriptor, every number with its source and trust."""
    import yaml

    from edgetune.profile import device

    plain = device.load(device_id).model_dump(mode="json", exclude_none=True, exclude_defaults=not as_json)
    printed(plain if as_json else yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110).rstrip("\n"))
    return 0


@devices.command("validate")
def devices_validate(
    paths: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Ids or paths; default: all.")] = None,
    as_json: Json = False,
) -> int:
    """Check descriptors, print every fault; for all of them, also published measurements beside predictions."""
    from edgetune.document import raise_all
    from edgetune.profile import device
    from edgetune.profile.validate import validate
    from edgetune.technique import EdgetuneError, Exit

    errors: list[EdgetuneError] = []
    valid = []
    for name in paths or device.ids():
        try:
            valid.append(device.load(name).id)
        except EdgetuneError as error:
            errors.append(error)
    rows = () if paths or errors else validate().rows
    if as_json:
        told = [row.model_dump(mode="json") for row in rows]
        printed({"valid": valid, "errors": [str(error) for error in errors], "published": told})
        return int(Exit.USAGE) if errors else 0
    raise_all("devices", errors)
    printed(f"valid: {', '.join(valid)}")
    for row in rows:
        printed(_published(row))
    return 0


def _published(row: Compared) -> str:
    """One published measurement beside its prediction."""
    what = f"{row.device}, {row.engine}, {row.what}: published {row.published:g} {row.unit}"
    if row.predicted is None:
        return f"{what}, not predicted: {row.note}"
    band = f"predicted {row.predicted:.3g} ({row.low:.3g} to {row.high:.3g}), {row.error_pct:+.0f} %"
    return f"{what}, {band}, {'inside' if row.inside else 'outside'} the band{'; ' if row.note else ''}{row.note}"


@devices.command("calibrate")
def devices_calibrate(
    out: Annotated[Path | None, typer.Option(help="The descriptor to write; default: host.yaml of your own.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores of the process.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few programs, for a trial; predicts poorly.")] = False,
    as_json: Json = False,
) -> int:
    """Time micro-programs on this host and write its descriptor; about three minutes on 2 cores."""
    from edgetune.profile.calibrate import calibrate
    from edgetune.profile.device import HOST, SUFFIX, user_folder
    from edgetune.progress import shown

    with shown() as progress, contextlib.redirect_stdout(sys.stderr):

        def told(name: str, done: int, of: int) -> None:
            progress("calibrate", done, of, name)

        found = calibrate(out, threads=threads, quick=quick, progress=told)
    path = out or user_folder() / (HOST + SUFFIX)
    printed({"path": str(path), **found.model_dump(mode="json")} if as_json else f"{path}: {found.name}, {found.soc}")
    return 0
