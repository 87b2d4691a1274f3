"""A training program on disk: `model.pte`, and `model.json` beside it that says everything known about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgetune.core.ledger import Leftover
from edgetune.program.artifact import TensorSpec, Value, read_manifest
from edgetune.program.beside import artifact_line
from edgetune.program.operators import Operator


class SliceSpec(Value):
    """Which channels of a layer's weight a `slice` stands for."""

    layer: str
    dim: int  # of the weight
    indices: tuple[int, ...]


class TrainingParity(Value):
    """The program's losses beside those of eager SGD, step by step from the same weights on the same batches."""

    steps: int
    learning_rate: float
    max_abs_loss_difference: float
    losses: tuple[float, ...]  # the program's


class TrainingManifest(Value):
    """What `model.json` holds for a training program."""

    format: Literal[1] = 1
    kind: Literal["training"] = "training"
    target: str
    inputs: tuple[TensorSpec, ...]
    labels: TensorSpec
    momentum: float
    trainable: tuple[TensorSpec, ...]
    slices: tuple[SliceSpec, ...]
    size_bytes: int  # of the .pte
    plan_bytes: int  # arena of a training step, without the state
    forward_plan_bytes: int
    state_bytes: int  # what trains and its momentum
    sha256: str
    versions: dict[str, str]
    delegates: int  # calls into the backend in a training step, as all below
    delegated_macs_pct: float
    delegated_operators_pct: float
    leftovers: tuple[Leftover, ...]
    operators: tuple[Operator, ...]
    parity: TrainingParity


@dataclass(frozen=True)
class TrainingArtifact:
    """A training `.pte` and its manifest."""

    path: Path
    manifest: TrainingManifest

    def __repr__(self) -> str:
        return artifact_line(self, self.path, self.manifest.size_bytes, self.manifest.target)

    @classmethod
    def load(cls, path: str | Path) -> TrainingArtifact:
        """Read the manifest of the `.pte` at `path` and check that it describes that very file."""
        return cls(path=Path(path), manifest=read_manifest(Path(path), TrainingManifest))
