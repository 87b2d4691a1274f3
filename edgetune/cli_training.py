"""The verbs of training programs: train with one on this host, and pull the weights back into a model."""

from __future__ import annotations

import contextlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgetune.cli_devices import Json, printed

if TYPE_CHECKING:
    from edgetune.prepared import Prepared

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A name in the package, or a path ending in .yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes: train.epochs=2, steps.3.ratio=0.5, variant=smoke."),
]


def _prepared(recipe: str, overrides: list[str]) -> Prepared:
    from edgetune.overrides import from_text
    from edgetune.prepared import prepare
    from edgetune.recipe import load

    return prepare(load(recipe, from_text(overrides)))


def export_training(
    recipe: str, overrides: list[str], out: Path, rows: int, momentum: float, target: str | None, as_json: bool
) -> int:
    """`edgetune export RECIPE --train`: the recipe's first training as a program that trains on a device."""
    from edgetune.export.training.step import export_training as lower

    with contextlib.redirect_stdout(sys.stderr):
        found = _prepared(recipe, overrides)
        inputs, labels = next(found.batches(rows))
        artifact = lower(
            found.model, inputs, labels, out, loss=found.loss, target=target or "xnnpack", momentum=momentum
        )
    known = artifact.manifest
    if as_json:
        printed(known.model_dump(mode="json"))
        return 0
    weights = sum(math.prod(s.shape) for s in known.trainable)
    printed(
        f"{artifact.path}: {known.size_bytes / 2**20:.2f} MiB, plan {known.plan_bytes / 2**20:.1f} MiB, "
        f"{weights:,} values train; losses of {known.parity.steps} steps equal eager's to "
        f"{known.parity.max_abs_loss_difference:.1e}"
    )
    return 0


def train_pte(
    program: Annotated[Path, typer.Argument(help="A program of `edgetune export RECIPE --train`.")],
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The trained state.")] = Path("trained.safetensors"),
    resume: Annotated[Path | None, typer.Option(help="Go on from this state.")] = None,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Of SGD.")] = 0.01,
    epochs: Annotated[int, typer.Option(min=1, help="Times through the training rows.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many.")] = None,
    as_json: Json = False,
) -> int:
    """Train with a training program on this host, on a recipe's data."""
    from edgetune.export.training.artifact import TrainingArtifact
    from edgetune.export.training.run import pull as pull_
    from edgetune.export.training.run import train_pte as train

    with contextlib.redirect_stdout(sys.stderr):
        found = _prepared(recipe, overrides or [])
        rows = TrainingArtifact.load(program).manifest.inputs[0].shape[0]
        batches = (batch for epoch in range(epochs) for batch in found.batches(rows, epoch))
        losses = train(program, batches, learning_rate, steps=steps, resume=resume, checkpoint=out)
        quality = found.quality(pull_(out, found.model))
    told = {"steps": len(losses), "losses": losses, quality.metric: quality.value, "state": str(out)}
    text = f"{out}: {len(losses)} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}, {quality.metric} {quality.value:.2f}"
    printed(told if as_json else f"{text} on {quality.rows} test rows")
    return 0


def pull(
    source: Annotated[Path, typer.Argument(help="The state that `edgetune train-pte` wrote, or the program itself.")],
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The model's weights.")] = Path("model.safetensors"),
    as_json: Json = False,
) -> int:
    """Bring weights trained by a program back into the recipe's PyTorch model, and write its state dict."""
    from safetensors.torch import save_model

    from edgetune.attach import finalize
    from edgetune.export.training.run import pull as pull_

    with contextlib.redirect_stdout(sys.stderr):
        found = _prepared(recipe, overrides or [])
        model = finalize(pull_(source, found.model))
        quality = found.quality(model)
        save_model(model, str(out))
    told = {"weights": str(out), quality.metric: quality.value, "rows": quality.rows}
    printed(told if as_json else f"{out}: {quality.metric} {quality.value:.2f} on {quality.rows} test rows")
    return 0
