"""An exported program on disk: `model.pte`, and `model.json` beside it that says everything known about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.files import replacing
from edgetune.core.inputs import Inputs, tensors_of
from edgetune.core.ledger import Leftover, Parity, Program
from edgetune.program.beside import Value, artifact_line, check_bytes, program_at, sha256_of, unusable
from edgetune.program.carried import Carried, files_beside
from edgetune.program.operators import Operator
from edgetune.runtime.run import run_in_child

__all__ = [
    "Artifact", "DataFile", "Lowering", "Manifest", "OfFile", "Plan", "TensorSpec", "Value", "admitted", "check_bytes",
    "data_beside", "data_path", "described_data", "manifest_path", "program_at", "read_manifest", "read_whole",
    "sha256_of", "unusable", "write_pair",
]  # fmt: skip

_Manifest = TypeVar("_Manifest", bound=BaseModel)
_OfFile = TypeVar("_OfFile", bound="OfFile")


class TensorSpec(Value):
    """One input or output of the program."""

    name: str
    shape: tuple[int, ...]  # the largest, where sizes may differ
    dtype: str  # "int64", "float32"
    smallest: tuple[int, ...] | None = None  # None: `shape` is the only one
    free: dict[int, str] = Field(default_factory=dict)  # axes whose size may differ, by name: equal names, equal sizes

    def __str__(self) -> str:
        pairs = zip(self.smallest or self.shape, self.shape, strict=True)
        return f"{self.dtype} ({', '.join(str(high) if low == high else f'{low} to {high}' for low, high in pairs)})"

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor has this type, and sizes within these bounds."""
        sizes = tuple(tensor.shape)
        pairs = zip(self.smallest or self.shape, sizes, self.shape)  # noqa: B905  their lengths are compared
        inside = len(sizes) == len(self.shape) and all(low <= size <= high for low, size, high in pairs)
        return inside and str(tensor.dtype).removeprefix("torch.") == self.dtype


class Plan(Value):
    """How the arena is laid out: the way that was taken, and the bytes of all that were tried."""

    way: str
    tried_bytes: dict[str, int]
    holds_io: bool = True  # inputs and outputs lie in the arena


class DataFile(Value):
    """The file with the weights, where they lie apart from the program."""

    file: str  # in the program's folder
    size_bytes: int
    sha256: str


class OfFile(Value):
    """What a manifest says of the file, however many methods are in it."""

    format: Literal[1] = 1
    target: str
    device: str | None  # the device it was made for, if one was named
    size_bytes: int  # of the .pte; what methods share is in it once
    sha256: str
    versions: dict[str, str]
    data: DataFile | None = None  # None: the weights are in the program
    note: str = ""

    @property
    def total_bytes(self) -> int:
        """Of the program and of its data file."""
        return self.size_bytes + (self.data.size_bytes if self.data else 0)


class Lowering(Value):
    """What a manifest says of one method as it was lowered."""

    plan_bytes: int  # arena for the activations; each loaded method has its own
    plan: Plan | None = None
    delegates: int  # calls into the backend
    delegated_macs_pct: float
    delegated_operators_pct: float
    leftovers: tuple[Leftover, ...]
    operators: tuple[Operator, ...]
    executed: tuple[Operator, ...] = ()  # what the runtime makes of them: what a prediction is summed over
    folded: str = ""  # branches and norms that became part of their layers, and by how much the output changed


class Manifest(Lowering, OfFile):
    """What `model.json` holds. In this order: the fields of the file come first."""

    kind: Literal["model"] = "model"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: Parity | None  # None: this machine cannot run the target; `note` says so
    carried: Carried | None = None  # what an app needs beside the program


@dataclass(frozen=True)
class Artifact:
    """A `.pte` and its manifest."""

    path: Path
    manifest: Manifest

    def __repr__(self) -> str:
        return artifact_line(self, self.path, self.manifest.total_bytes, self.manifest.target)

    @classmethod
    def load(cls, path: str | Path) -> Artifact:
        """Read the manifest of the `.pte` at `path` and check that it describes that very file and its data."""
        found = cls(path=Path(path), manifest=read_whole(Path(path), Manifest))
        files_beside(found.manifest.carried, found.path)
        return found

    @property
    def data_path(self) -> Path | None:
        """The `.ptd` with the weights, where they lie apart."""
        return data_beside(self.path, self.manifest)

    def run(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The outputs for these inputs, computed by the program in a child process.

        Raises `EdgetuneError` (exit code 5) for inputs of other shapes or types than the manifest states.
        """
        tensors = admitted(self.manifest.inputs, inputs)
        return run_in_child(self.path, [tensors], data=self.data_path)[0]

    def program(self) -> Program:
        """The ledger's summary."""
        known = self.manifest
        return Program(
            path=str(self.path),
            target=known.target,
            size_mib=known.total_bytes / 2**20,
            plan_kib=known.plan_bytes / 2**10,
            sha256=known.sha256,
            delegated_macs_pct=known.delegated_macs_pct,
            delegated_operators_pct=known.delegated_operators_pct,
            leftovers=known.leftovers,
            parity=known.parity,
        )


def admitted(specs: Sequence[TensorSpec], inputs: Inputs, what: str = "the inputs") -> tuple[Tensor, ...]:
    """The inputs by position, in memory order. Raises where they are not what a program with these specs takes."""
    if isinstance(inputs, dict) and set(inputs) == {spec.name for spec in specs}:
        inputs = {spec.name: inputs[spec.name] for spec in specs}
    tensors = tuple(tensor.detach().cpu().contiguous() for tensor in tensors_of(inputs))
    sizes: dict[str, set[int]] = {}
    for spec, tensor in zip(specs, tensors):  # noqa: B905  their number is compared below
        for axis, name in spec.free.items():
            sizes.setdefault(name, set()).update(tensor.shape[axis : axis + 1])
    untied = [name for name, found in sizes.items() if len(found) > 1]
    fit = len(tensors) == len(specs) and all(spec.fits(tensor) for spec, tensor in zip(specs, tensors, strict=True))
    if fit and not untied:
        return tensors
    also = f"; {untied[0]} must be the same everywhere" if untied else ""
    raise EdgetuneError(
        f"{what}: shapes or types that the program does not take{also}",
        got=[f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors],
        allowed=[f"{spec.name}: {spec}" for spec in specs],
        action="pad or cut them, or export with bounds that include them: dynamic={...}",
        exit_code=Exit.EXPORT,
    )


def read_manifest(path: Path, kind: type[_Manifest]) -> _Manifest:
    """The manifest beside the `.pte` at `path`, of this kind and of that very file."""
    beside = manifest_path(program_at(path))
    if not beside.is_file():
        what = f"the file that belongs to {path.name} is missing"
        action = "copy it there, or export the model again"
        raise EdgetuneError(what, where=str(beside), action=action, exit_code=Exit.EXPORT)
    try:
        told = json.loads(beside.read_text(encoding="utf-8"))
        wanted = kind.model_fields["kind"].default
        if isinstance(told, dict) and told.get("kind", "model") != wanted:
            raise _of_another_kind(path, str(told["kind"]), wanted)
        manifest = kind.model_validate(told, strict=False)
    except (ValidationError, UnicodeDecodeError, json.JSONDecodeError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise unusable(f"the manifest cannot be read: {what}", beside) from error
    check_bytes(path, manifest.sha256)  # type: ignore[attr-defined]
    return manifest


_KINDS = {  # what a program is, and what reads it
    "model": ("a plain program", "it is run by Artifact.load(path).run(inputs)"),
    "language": ("a text-generation program", "edgetune generate lets it answer"),
    "training": ("a training program", "edgetune train-pte trains with it"),
    "methods": ("a program with several methods", "it is run by MethodsArtifact.load(path).run(method, inputs)"),
}
_MAKING = {
    "language": "export the model with --language to have one that generates text",
    "training": "make one with edgetune export-training",
}


def _of_another_kind(path: Path, kind: str, wanted: str) -> EdgetuneError:
    """The error for a program of one kind where another is needed."""
    this, reader = _KINDS.get(kind, (f"a program of the kind {kind}", "export the model again"))
    what = f"a program of another kind: this is {this}, not {_KINDS[wanted][0]}"
    return EdgetuneError(what, where=str(path), action=_MAKING.get(wanted, reader), exit_code=Exit.EXPORT)


def read_whole(path: Path, kind: type[_OfFile]) -> _OfFile:
    """The same, once its data file too is the very one that the manifest names."""
    manifest = read_manifest(path, kind)
    if manifest.data is not None:
        check_bytes(path.with_name(manifest.data.file), manifest.data.sha256)
    return manifest


def data_beside(path: Path, manifest: OfFile) -> Path | None:
    """The `.ptd` with the weights of the `.pte` at `path`, where they lie apart."""
    return path.with_name(manifest.data.file) if manifest.data is not None else None


def manifest_path(path: Path) -> Path:
    """`model.json` for `model.pte`."""
    return path.with_suffix(".json")


def data_path(path: Path) -> Path:
    """`model.ptd` for `model.pte`."""
    return path.with_suffix(".ptd")


def described_data(path: Path, weights: bytes) -> DataFile | None:
    """What the manifest of the `.pte` at `path` says of its data file."""
    return DataFile(file=data_path(path).name, size_bytes=len(weights), sha256=sha256_of(weights)) if weights else None


def write_pair(path: Path, data: bytes, check: Callable[[Path], _Manifest], weights: bytes = b"") -> _Manifest:
    """Write the program under a temporary name, let `check` run it, and only then give both files their names.

    `weights` become a third file, which `check` finds by `data_path`. The manifest is last: where it lies, the files
    that it names are whole. On any failure the temporary files go, and what stood at `path` before stays.
    """
    beside = manifest_path(path)
    files = (data_path(path), path, beside) if weights else (path, beside)
    with replacing(*files) as (*apart, partial, text):
        partial.write_bytes(data)
        for file in apart:
            file.write_bytes(weights)
        try:
            manifest = check(partial)
        except EdgetuneError as error:
            error.where = str(path)  # the temporary name is of no use to anyone
            raise
        text.write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        stale = _data_named_in(beside)
        beside.unlink(missing_ok=True)  # it describes the program that is about to go
        if stale is not None:
            stale.unlink(missing_ok=True)
    return manifest


def _data_named_in(beside: Path) -> Path | None:
    """The data file of the program that is replaced."""
    try:
        name = json.loads(beside.read_text(encoding="utf-8"))["data"]["file"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return beside.with_name(name) if name == data_path(beside).name else None
