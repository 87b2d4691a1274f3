"""The verbs of training programs: `export-training`, `train-pte` and `pull`."""

from __future__ import annotations

import contextlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgetune.cli.complete import recipe_names, target_names
from edgetune.cli.devices import Json, print_result

if TYPE_CHECKING:
    from edgetune.run.prepared import Prepared

RecipeName = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A packaged recipe, or a path ending in .yaml.", autocompletion=recipe_names),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, such as train.epochs=2, steps.3.ratio=0.5 or variant=smoke."),
]


def _prepare(recipe: str, overrides: list[str]) -> Prepared:
    from edgetune.recipe.overrides import parse_overrides
    from edgetune.recipe.recipe import load
    from edgetune.run.prepared import prepare

    return prepare(load(recipe, parse_overrides(overrides)))


def export_training(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Program to write.")] = Path("train.pte"),
    target: Annotated[str, typer.Option(help="Lower for this target.", autocompletion=target_names)] = "xnnpack",
    rows: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 8,
    optimizer: Annotated[str, typer.Option(help="sgd, or adamw, whose two moments the program keeps.")] = "sgd",
    momentum: Annotated[float, typer.Option(min=0.0, max=0.999, help="Momentum of SGD.")] = 0.0,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Weight decay of AdamW.")] = 0.0,
    as_json: Json = False,
) -> int:
    """Export the training of a recipe as a program.

    The steps of the recipe before its first training are applied on this host. The program then trains the trainable
    weights, one batch per call, and is compared with PyTorch.
    """
    from edgetune.export.training.step import export_training as lower

    with contextlib.redirect_stdout(sys.stderr):
        prepared = _prepare(recipe, overrides or [])
        inputs, labels = next(prepared.batches(rows))
        artifact = lower(
            prepared.model, inputs, labels, out, loss=prepared.loss, target=target,
            optimizer=optimizer,  # type: ignore[arg-type]  # checked by the export, which names the optimizers
            momentum=momentum, weight_decay=weight_decay,
        )  # fmt: skip
    manifest, training = artifact.manifest, artifact.training
    if as_json:
        print_result(manifest.model_dump(mode="json"))
        return 0
    weights = sum(math.prod(spec.shape) for spec in training.trainable)
    print_result(
        f"{artifact.path}: {manifest.size_bytes / 2**20:.2f} MiB, plan {manifest.main.plan_bytes / 2**20:.1f} MiB, "
        f"{weights:,} trainable values; losses of {training.parity.steps} steps within "
        f"{training.parity.max_abs_loss_difference:.1e} of eager mode"
    )
    return 0


def train_pte(
    program: Annotated[Path, typer.Argument(help="A program from `edgetune export-training`.")],
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write the trained state to.")] = Path(
        "trained.safetensors"
    ),
    resume: Annotated[Path | None, typer.Option(help="Continue from this state.")] = None,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Learning rate.")] = 0.01,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training rows.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Stop after this many steps.")] = None,
    as_json: Json = False,
) -> int:
    """Train with a training program on this host.

    The rows come from the data of the recipe.
    """
    from edgetune.core.numbers import format_quality as in_words
    from edgetune.export.training.pull import pull as pull_
    from edgetune.program.artifact import Artifact
    from edgetune.runtime.training import train_pte as train

    with contextlib.redirect_stdout(sys.stderr):
        prepared = _prepare(recipe, overrides or [])
        rows = Artifact.load(program, "training").manifest.call("train").inputs[0].shape[0]
        batches = (batch for epoch in range(epochs) for batch in prepared.batches(rows, epoch))
        losses = train(program, batches, learning_rate, steps=steps, resume=resume, checkpoint=out)
        quality = prepared.quality(pull_(out, prepared.model))
    figures = {"steps": len(losses), "losses": losses, quality.metric: quality.value, "state": str(out)}
    text = f"{out}: {len(losses)} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}, {in_words(quality)}"
    print_result(figures if as_json else f"{text} on {quality.rows} test rows")
    return 0


def pull(
    source: Annotated[Path, typer.Argument(help="The state written by `edgetune train-pte`, or the training program.")],
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write the weights to.")] = Path("model.safetensors"),
    adapter: Annotated[
        Path | None, typer.Option(help="Also save the trained adapter in this folder, in peft's format.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Load weights trained by a program back into PyTorch.

    The weights are loaded into the model of the recipe, which is finalized, tested and saved as a state dict.
    """
    from safetensors.torch import save_model

    from edgetune.adapt.files import save_adapter
    from edgetune.core.apply import finalize
    from edgetune.core.numbers import format_quality as in_words
    from edgetune.export.training.pull import pull as pull_

    with contextlib.redirect_stdout(sys.stderr):
        prepared = _prepare(recipe, overrides or [])
        model = pull_(source, prepared.model)
        if adapter is not None:
            save_adapter(model, adapter)
        model = finalize(model)
        quality = prepared.quality(model)
        save_model(model, str(out))
    figures = {"weights": str(out), quality.metric: quality.value, "rows": quality.rows}
    print_result(figures if as_json else f"{out}: {in_words(quality)} on {quality.rows} test rows")
    return 0
