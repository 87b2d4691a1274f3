"""Your own descriptors: check a file and copy it to the user's folder, or copy another one to edit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from edgetune.core.errors import EdgetuneError
from edgetune.core.files import write_atomically
from edgetune.profile import calibration as calibrations
from edgetune.profile.device import ID, load, parse, read
from edgetune.recipe.names import HOST, SUFFIX, packaged_ids, user_descriptors, user_folder


def add(path: Path, *, replace: bool = False) -> Path:
    """Check a descriptor and copy it unchanged to the user's folder under its id. Returns the new path.

    A calibration next to it is copied too; that of a replaced descriptor is deleted, since it was fitted to other
    numbers. Raises `EdgetuneError` for every fault of the file, for a name that ships with edgetune, and for one that
    exists already unless `replace`.
    """
    if path.suffix != SUFFIX:
        raise EdgetuneError(
            "a device is added from a .yaml file",
            got=str(path),
            action="name a file, or start one with `edgetune devices add --like pixel-8 NAME`",
        )
    device = load(path)
    text = path.read_text(encoding="utf-8")
    target = _target_path(device.id, replace)
    _write(target, text, device.calibration)
    return target


def copy(like: str, name: str, *, replace: bool = False) -> Path:
    """Copy the descriptor `like` under another name, to be edited. Returns the new path.

    Every source is marked as copied and gets low trust: the numbers are those of another device until someone checks
    them. A calibration is not copied, since it was fitted to that device alone.
    """
    if not re.fullmatch(ID, name):
        raise EdgetuneError(
            "an id consists of lower-case letters, digits and single hyphens", got=name, action="as in my-phone"
        )
    content, where = read(like)
    original = parse(content, where)
    target = _target_path(name, replace)
    copied: Any = _mark_as_copied(content, original.id)
    copied.update(id=name, name=f"{original.name} (copy)")
    first = f"Copied from {original.id}: put in what differs, with its own source and trust."
    copied["notes"] = [first, *original.notes]
    parse(copied, str(target))
    # flow style for the innermost mappings: one number, one line
    text = yaml.safe_dump(copied, default_flow_style=None, sort_keys=False, allow_unicode=True, width=160)
    _write(target, text, None)
    return target


def _mark_as_copied(value: object, like: str) -> object:
    """The same with each source marked as copied, and low trust."""
    if isinstance(value, list):
        return [_mark_as_copied(item, like) for item in value]
    if not isinstance(value, dict):
        return value
    copied = {key: _mark_as_copied(item, like) for key, item in value.items()}
    if "source" in copied and "trust" in copied:
        copied.update(source=f"copied from {like}: {copied['source']}", trust="low")
    return copied


def _target_path(name: str, replace: bool) -> Path:
    """The path for a descriptor of that name. Raises if it would hide or overwrite another."""
    if name == HOST:
        raise EdgetuneError(
            f"{HOST!r} is this machine", action="run `edgetune devices calibrate`, or give the file another id"
        )
    if name in packaged_ids():
        raise EdgetuneError(f"device {name!r} is part of edgetune", action="give the descriptor another id")
    there = user_descriptors().get(name)
    if there is not None and not replace:
        raise EdgetuneError(f"device {name!r} already exists: {there}", action="add --replace, or choose another id")
    return user_folder() / (name + SUFFIX)


def _write(target: Path, text: str, calibration: calibrations.Calibration | None) -> None:
    """Write the descriptor and its calibration, if it has one."""
    calibration_file = calibrations.calibration_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        calibration_file.unlink(missing_ok=True)  # first, so that no descriptor is used with another's calibration
    except OSError as error:
        message = f"cannot write to the folder of your devices: {error.strerror or error}"
        raise EdgetuneError(
            message, got=str(target.parent), action="set XDG_CONFIG_HOME to a folder that you can write to"
        ) from error
    write_atomically(target, text)
    if calibration is not None:
        calibrations.write(calibration_file, calibration)
