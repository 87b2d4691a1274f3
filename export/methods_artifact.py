"""A program with several methods on disk: `model.pte`, and `model.json` that says everything known about each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from edgetune.export.artifact import DataFile, Plan, TensorSpec, Value, admitted, check_data, read_manifest
from edgetune.export.run import run_in_child
from edgetune.ledger import Leftover
from edgetune.profile.operators import Operator
from edgetune.technique import EdgetuneError, Exit, Inputs


class MethodParity(Value):
    """A method of the program against the same in eager mode, over all outputs."""

    rows: int
    max_abs_difference: float
    max_relative_difference: float  # length of the difference over the length of the output, the largest of all


class MethodSpec(Value):
    """One method: what it takes and gives, and what is known of it."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    plan_bytes: int  # arena for the activations; each loaded method has its own
    plan: Plan | None = None
    delegates: int  # calls into the backend
    delegated_macs_pct: float
    delegated_operators_pct: float
    leftovers: tuple[Leftover, ...]
    operators: tuple[Operator, ...]
    parity: MethodParity | None  # None: this machine cannot run the target; the manifest's `note` says so
    folded: str = ""


class MethodsManifest(Value):
    """What `model.json` holds for a program with several methods."""

    format: Literal[1] = 1
    kind: Literal["methods"] = "methods"
    target: str
    device: str | None
    methods: tuple[MethodSpec, ...]
    size_bytes: int  # of the .pte; what methods share is in it once
    data: DataFile | None = None  # None: the weights are in the program
    sha256: str
    versions: dict[str, str]
    note: str = ""

    def method(self, name: str) -> MethodSpec:
        """The method of that name."""
        found = next((method for method in self.methods if method.name == name), None)
        if found is None:
            allowed = [method.name for method in self.methods]
            raise EdgetuneError("no such method", got=name, allowed=allowed, exit_code=Exit.EXPORT)
        return found


@dataclass(frozen=True)
class MethodsArtifact:
    """A `.pte` with several methods, and its manifest."""

    path: Path
    manifest: MethodsManifest

    @classmethod
    def load(cls, path: str | Path) -> MethodsArtifact:
        """Read the manifest of the `.pte` at `path` and check that it describes that very file and its data."""
        found = cls(path=Path(path), manifest=read_manifest(Path(path), MethodsManifest))
        check_data(found.path, found.manifest.data)
        return found

    @property
    def data_path(self) -> Path | None:
        """The `.ptd` with the weights, where they lie apart."""
        return self.path.with_name(self.manifest.data.file) if self.manifest.data else None

    def run(self, method: str, inputs: Inputs) -> tuple[Tensor, ...]:
        """The outputs of a method for these inputs, computed by the program in a child process.

        Raises `EdgetuneError` (exit code 5) for inputs of other shapes or types than the manifest states.
        """
        tensors = admitted(self.manifest.method(method).inputs, inputs)
        return run_in_child(self.path, [tensors], method=method, data=self.data_path)[0]
