"""An exported program on disk: `model.pte`, and `model.json` beside it that says everything known about it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from edgetune.ledger import Leftover, Parity, Program
from edgetune.profile.operators import Operator
from edgetune.technique import EdgetuneError, Exit

_Manifest = TypeVar("_Manifest", bound=BaseModel)


class Value(BaseModel):
    """Base of what stands in a manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(Value):
    """One input or output of the program."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # "int64", "float32"


class Manifest(Value):
    """What `model.json` holds."""

    format: Literal[1] = 1
    kind: Literal["model"] = "model"
    target: str
    device: str | None  # the device it was made for, if one was named
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    size_bytes: int  # of the .pte
    plan_bytes: int  # arena for the activations
    sha256: str
    versions: dict[str, str]
    delegates: int  # calls into the backend
    delegated_macs_pct: float
    delegated_operators_pct: float
    leftovers: tuple[Leftover, ...]
    operators: tuple[Operator, ...]
    parity: Parity | None  # None: this machine cannot run the target; `note` says so
    note: str = ""
    folded: str = ""  # branches and norms that became part of their layers, and by how much the output changed


@dataclass(frozen=True)
class Artifact:
    """A `.pte` and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | Path) -> Artifact:
        """Read the manifest of the `.pte` at `path` and check that it describes that very file."""
        return cls(path=Path(path), manifest=read_manifest(Path(path), Manifest))

    def program(self) -> Program:
        """The ledger's summary."""
        known = self.manifest
        return Program(
            path=str(self.path),
            target=known.target,
            size_mib=known.size_bytes / 2**20,
            plan_kib=known.plan_bytes / 2**10,
            sha256=known.sha256,
            delegated_macs_pct=known.delegated_macs_pct,
            delegated_operators_pct=known.delegated_operators_pct,
            leftovers=known.leftovers,
            parity=known.parity,
        )


def read_manifest(path: Path, kind: type[_Manifest]) -> _Manifest:
    """The manifest beside the `.pte` at `path`, of this kind and of that very file."""
    beside = manifest_path(path)
    for file in (path, beside):
        if not file.is_file():
            raise unusable("no such file", file)
    try:
        told = json.loads(beside.read_text(encoding="utf-8"))
        wanted = kind.model_fields["kind"].default
        if isinstance(told, dict) and told.get("kind", "model") != wanted:
            raise unusable("a program of another kind", path, got=told["kind"], allowed=[wanted])
        manifest = kind.model_validate(told, strict=False)
    except (ValidationError, UnicodeDecodeError, json.JSONDecodeError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise unusable(f"the manifest cannot be read: {what}", beside) from error
    check_bytes(path, manifest.sha256)  # type: ignore[attr-defined]
    return manifest


def check_bytes(file: Path, sha256: str) -> None:
    """Raise unless these are the bytes that a manifest names."""
    found = sha256_of(file.read_bytes())
    if found != sha256:
        raise unusable("the file is not the one that its manifest describes", file, got=found, allowed=[sha256])


def unusable(what: str, where: Path, got: object = None, allowed: Sequence[str] = ()) -> EdgetuneError:
    """What is wrong with a program or a file beside it."""
    return EdgetuneError(
        what, where=str(where), got=got, allowed=allowed, action="export the model again", exit_code=Exit.EXPORT
    )


def manifest_path(path: Path) -> Path:
    """`model.json` for `model.pte`."""
    return path.with_suffix(".json")


def sha256_of(data: bytes) -> str:
    """The SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def write_pair(path: Path, data: bytes, check: Callable[[Path], _Manifest]) -> _Manifest:
    """Write the program under a temporary name, let `check` run it, and only then give both files their names.

    The manifest is last: where it lies, the program beside it is whole. On any failure the temporary file goes,
    and what stood at `path` before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial.pte")
    beside = manifest_path(path)
    text = partial.with_suffix(".json")
    try:
        _write(partial, data)
        try:
            manifest = check(partial)
        except EdgetuneError as error:
            error.where = str(path)  # the temporary name is of no use to anyone
            raise
        _write(text, manifest.model_dump_json(indent=1).encode())
        beside.unlink(missing_ok=True)  # it describes the program that is about to go
        os.replace(partial, path)
        os.replace(text, beside)
    finally:
        partial.unlink(missing_ok=True)
        text.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return manifest


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
