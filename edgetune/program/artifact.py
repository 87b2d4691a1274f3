"""An exported program on disk: `model.pte`, and `model.json`, which describes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.files import replace_files
from edgetune.core.inputs import Inputs, tensors_of
from edgetune.core.ledger import Program
from edgetune.core.numbers import MIB, format_number
from edgetune.program.adapters import SUFFIXES, Adapter, adapter_tensors, data_with_adapter
from edgetune.program.manifest import (
    LanguageSpec,
    Manifest,
    ProgramKind,
    TensorSpec,
    TrainingSpec,
    data_path,
    manifest_path,
    read_manifest,
    wrong_kind_error,
)
from edgetune.program.program_files import check_bytes, program_at
from edgetune.runtime.clock.runs import versions
from edgetune.runtime.run import run_in_child


@dataclass(frozen=True)
class Artifact:
    """A `.pte` and its manifest."""

    path: Path
    manifest: Manifest

    def __repr__(self) -> str:
        manifest = self.manifest
        facts = [manifest.target, f"{format_number(manifest.total_bytes / MIB)} MiB"]
        facts[:0] = [manifest.kind] if manifest.kind != "model" else []
        return f"Artifact({', '.join([repr(str(self.path)), *facts])})"

    @classmethod
    def load(cls, path: str | Path, *kinds: ProgramKind) -> Artifact:
        """Read the manifest of the `.pte` at `path`, or of a run's folder, and check the files that it names.

        Raises `EdgetuneError` (exit code 5) unless the program is of one of `kinds`, if any are given.
        """
        path = program_at(Path(path))
        artifact = cls(path=path, manifest=read_manifest(path, *kinds))
        for name, sha256 in artifact.manifest.files.items():
            check_bytes(path.with_name(name), sha256)
        return artifact

    @property
    def data_path(self) -> Path | None:
        """The `.ptd` with the weights, if they are not in the `.pte`."""
        return self.path.with_name(self.manifest.data.file) if self.manifest.data is not None else None

    @property
    def language(self) -> LanguageSpec:
        """The section of a text-generation program. Raises for a program of another kind."""
        if self.manifest.language is None:
            raise wrong_kind_error(self.path, self.manifest.kind, "language")
        return self.manifest.language

    @property
    def training(self) -> TrainingSpec:
        """The section of a training program. Raises for a program of another kind."""
        if self.manifest.training is None:
            raise wrong_kind_error(self.path, self.manifest.kind, "training")
        return self.manifest.training

    def check_runtime(self, installed: str | None = None, where: str = "") -> None:
        """Raise unless the program was made for this executorch: no other minor version promises to run it.

        `installed`: the version, by default the one installed here. `where`: the machine, if that is another one.
        """
        made = self.manifest.versions.get("executorch", "")
        installed = installed or versions().get("executorch", "")
        if made and installed and made.split(".")[:2] != installed.split(".")[:2]:
            raise EdgetuneError(
                f"the program was made for executorch {made}",
                where=where or str(self.path),
                got=f"executorch {installed}",
                action=f'pip install "executorch=={made}"{" there" if where else ""}, or export the model again',
                exit_code=Exit.EXPORT,
            )

    def run(self, inputs: Inputs, method: str = "", *, adapter: Adapter = None) -> tuple[Tensor, ...]:
        """The outputs for these inputs, computed by the program in a child process.

        `method`: needed if the program has several. `adapter`: the name of one of its adapters, or the path of a file
        for the same program; by default the base computes alone. Raises `EdgetuneError` (exit code 5) if shapes or
        types differ from those in the manifest, for an adapter of another base, and for a program that keeps a cache or
        state between calls.
        """
        guard = self.manifest.guard
        if self.manifest.kind not in ("model", "methods") and (guard is None or method != guard.call.name):
            raise wrong_kind_error(self.path, self.manifest.kind, "model")
        self.check_runtime()
        call = self.manifest.call(method)
        row = self.with_adapter(validate_inputs(self.manifest.own_inputs(call), inputs), adapter)
        with self.data_for(adapter) as data:
            return run_in_child(self.path, [row], method=call.name, data=data)[0]

    def with_adapter(self, row: tuple[Tensor, ...], adapter: Adapter) -> tuple[Tensor, ...]:
        """All inputs of the program for a row of the base's; in the form `files` they are the same."""
        return (*row, *adapter_tensors(self.path, self.manifest, adapter))

    def data_for(self, adapter: Adapter) -> AbstractContextManager[Path | None]:
        """The data file to load the program with, which holds the adapter in the form `files`."""
        return data_with_adapter(self.path, self.manifest, adapter)

    def program(self) -> Program:
        """Summarize it for the ledger."""
        manifest, call = self.manifest, self.manifest.main
        return Program(
            path=str(self.path),
            target=manifest.target,
            size_mib=manifest.total_bytes / 2**20,
            plan_kib=call.plan_bytes / 2**10,
            sha256=manifest.sha256,
            delegated_macs_pct=call.delegated_macs_pct,
            delegated_operators_pct=call.delegated_operators_pct,
            undelegated=call.undelegated,
            parity=call.parity,
        )


def validate_inputs(specs: Sequence[TensorSpec], inputs: Inputs, subject: str = "the inputs") -> tuple[Tensor, ...]:
    """The inputs by position, contiguous. Raises if a program with these specs does not accept them."""
    if isinstance(inputs, dict) and set(inputs) == {spec.name for spec in specs}:
        inputs = {spec.name: inputs[spec.name] for spec in specs}
    tensors = tuple(tensor.detach().cpu().contiguous() for tensor in tensors_of(inputs))
    sizes: dict[str, set[int]] = {}
    for spec, tensor in zip(specs, tensors):  # noqa: B905  their number is compared below
        for axis, name in spec.free.items():
            sizes.setdefault(name, set()).update(tensor.shape[axis : axis + 1])
    unequal = [name for name, axis_sizes in sizes.items() if len(axis_sizes) > 1]
    fit = len(tensors) == len(specs) and all(spec.fits(tensor) for spec, tensor in zip(specs, tensors, strict=True))
    if fit and not unequal:
        return tensors
    also = f"; {unequal[0]} must be the same everywhere" if unequal else ""
    raise EdgetuneError(
        f"{subject}: shapes or types that the program does not accept{also}",
        got=[f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors],
        allowed=[f"{spec.name}: {spec}" for spec in specs],
        action="pad or cut them, or export with bounds that include them: dynamic={...}",
        exit_code=Exit.EXPORT,
    )


def write_pair(
    path: Path,
    data: bytes,
    check: Callable[[Path], Manifest],
    weights: bytes = b"",
    adapters: Mapping[Path, bytes] | None = None,
) -> Manifest:
    """Write the program under a temporary name, `check` it, and only then rename it and its manifest.

    `weights` become a third file, which `check` locates by `data_path`, and `adapters` further ones. The manifest is
    renamed last, so that the files it names are complete if it exists. On failure the temporary files are deleted, and
    the old program stays.
    """
    manifest_file = manifest_path(path)
    beside = {**({data_path(path): weights} if weights else {}), **(adapters or {})}
    with replace_files(*beside, path, manifest_file) as (*apart, partial, text):
        partial.write_bytes(data)
        for file, content in zip(apart, beside.values(), strict=True):
            file.write_bytes(content)
        try:
            manifest = check(partial)
        except EdgetuneError as error:
            error.where = str(path)  # the temporary name is of no use to anyone
            raise
        text.write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        stale = _files_named_in(manifest_file)
        manifest_file.unlink(missing_ok=True)  # it describes the program that is about to be replaced
        for file in stale:
            file.unlink(missing_ok=True)
    return manifest


def _files_named_in(manifest_file: Path) -> list[Path]:
    """The data file and the adapters of the program that is being replaced."""
    try:
        stored = json.loads(manifest_file.read_text(encoding="utf-8"))
        entries = [stored.get("data"), *(stored.get("adapters") or {}).get("files", ())]
        names = [str(entry["file"]) for entry in entries if entry is not None]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    own = {data_path(manifest_file).name}
    return [manifest_file.with_name(name) for name in names if name in own or _is_adapter(name, manifest_file.stem)]


def _is_adapter(name: str, stem: str) -> bool:
    """Whether a file's name is one that an export gives to an adapter of the program: a manifest may be anyone's."""
    return name.startswith(f"{stem}.") and Path(name).name == name and Path(name).suffix in SUFFIXES.values()
