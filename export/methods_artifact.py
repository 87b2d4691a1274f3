"""A program with several methods on disk: `model.pte`, and `model.json` that says everything known about each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.inputs import Inputs
from edgetune.core.ledger import OutputParity
from edgetune.program.artifact import Lowering, OfFile, TensorSpec, Value, admitted, data_beside, read_whole
from edgetune.program.beside import artifact_line
from edgetune.runtime.run import run_in_child


class MethodParity(Value):
    """A method of the program against the same in eager mode, over all outputs."""

    rows: int
    max_abs_difference: float
    max_relative_difference: float  # over the largest value of the output; that of the output furthest off
    max_relative_allowed: float | None = None
    outputs: tuple[OutputParity, ...] = ()


class Signature(Value):
    """One method by its name: what it takes and gives."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class MethodSpec(Lowering, Signature):
    """One method, and what is known of it."""

    parity: MethodParity | None  # None: this machine cannot run the target; the manifest's `note` says so


class MethodsManifest(OfFile):
    """What `model.json` holds for a program with several methods."""

    kind: Literal["methods"] = "methods"
    methods: tuple[MethodSpec, ...]

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

    def __repr__(self) -> str:
        return artifact_line(
            self, self.path, self.manifest.total_bytes, self.manifest.target, f"{len(self.manifest.methods)} methods"
        )

    @classmethod
    def load(cls, path: str | Path) -> MethodsArtifact:
        """Read the manifest of the `.pte` at `path` and check that it describes that very file and its data."""
        return cls(path=Path(path), manifest=read_whole(Path(path), MethodsManifest))

    @property
    def data_path(self) -> Path | None:
        """The `.ptd` with the weights, where they lie apart."""
        return data_beside(self.path, self.manifest)

    def run(self, method: str, inputs: Inputs) -> tuple[Tensor, ...]:
        """The outputs of a method for these inputs, computed by the program in a child process.

        Raises `EdgetuneError` (exit code 5) for inputs of other shapes or types than the manifest states.
        """
        tensors = admitted(self.manifest.method(method).inputs, inputs)
        return run_in_child(self.path, [tensors], method=method, data=self.data_path)[0]
