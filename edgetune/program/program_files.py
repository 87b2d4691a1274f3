"""The files next to a program: their paths, their checksums, and the base class of what describes them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pydantic import ConfigDict

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.files import check_writable
from edgetune.core.one_line import OneLine
from edgetune.core.other_names import nearest_file

_MUST_END = "the file name of a program must end in .pte"


class Record(OneLine):
    """Base of the records in a manifest: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def sha256_of(data: bytes) -> str:
    """The SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def check_bytes(file: Path, sha256: str) -> None:
    """Raise unless the file exists and has the checksum that a manifest states."""
    if not file.is_file():
        raise unusable_error("no such file", file)
    actual = sha256_of(file.read_bytes())
    if actual != sha256:
        raise unusable_error("the file is not the one that its manifest describes", file, got=actual, allowed=[sha256])


def check_program_path(path: Path) -> None:
    """Raise, before any work, unless a program can be written there."""
    if path.suffix != ".pte":
        action = f"write {path.with_suffix('.pte')}" if path.name else "give the name of a file"
        raise EdgetuneError(_MUST_END, got=str(path), action=action)
    check_writable(path.parent)


def program_at(path: Path) -> Path:
    """The program that a path names: a `.pte`, or the `model.pte` of a run's folder.

    Raises `EdgetuneError` (exit code 2) if there is none.
    """
    place = path / "model.pte" if path.is_dir() else path
    if place.is_file() and place.suffix == ".pte":
        return place
    near = ""
    if path.is_dir():
        message, action = (
            "this folder contains no model.pte",
            "give a program, or the folder of a run that exported one",
        )
    elif path.suffix != ".pte":
        message, action = _MUST_END, "give a program; edgetune export makes one of a model"
    else:
        message, action, near = "no such program", "make one with edgetune export", nearest_file(path)
    raise EdgetuneError(message, got=str(path), near=str(path.with_name(near)) if near else "", action=action)


def unusable_error(message: str, where: Path, got: object = None, allowed: Sequence[str] = ()) -> EdgetuneError:
    """The error for a program, or a file next to it, that cannot be used."""
    return EdgetuneError(
        message, where=str(where), got=got, allowed=allowed, action="export the model again", exit_code=Exit.EXPORT
    )
