"""A training program on disk: `model.pte`, and `model.json` beside it that says everything known about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from edgetune.export.artifact import TensorSpec, manifest_path, sha256_of
from edgetune.ledger import Leftover
from edgetune.profile.operators import Operator
from edgetune.technique import EdgetuneError, Exit


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SliceSpec(_Value):
    """Which channels of a layer's weight a `slice` stands for."""

    layer: str
    dim: int  # of the weight
    indices: tuple[int, ...]


class TrainingParity(_Value):
    """The program's losses beside those of eager SGD, step by step from the same weights on the same batches."""

    steps: int
    learning_rate: float
    max_abs_loss_difference: float
    losses: tuple[float, ...]  # the program's


class TrainingManifest(_Value):
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

    @classmethod
    def load(cls, path: str | Path) -> TrainingArtifact:
        """Read the manifest of the `.pte` at `path` and check that it describes that very file."""
        path = Path(path)
        beside = manifest_path(path)
        for file in (path, beside):
            if not file.is_file():
                raise _unusable("no such file", str(file))
        try:
            manifest = TrainingManifest.model_validate_json(beside.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise _unusable(
                f"the manifest is not a training program's: {error.errors()[0]['msg']}", str(beside)
            ) from error
        if sha256_of(path.read_bytes()) != manifest.sha256:
            raise _unusable("the program is not the one that its manifest describes", str(path))
        return cls(path=path, manifest=manifest)


def _unusable(what: str, where: str) -> EdgetuneError:
    return EdgetuneError(what, where=where, action="export the training program again", exit_code=Exit.EXPORT)
