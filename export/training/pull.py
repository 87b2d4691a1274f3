"""Load the weights that a training program trained into a model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.merging import merge
from edgetune.export.training.update import parameter_of
from edgetune.program.manifest import STEP, SliceSpec
from edgetune.runtime.training import TrainingProgram, read_checkpoint
from edgetune.sparse.sliced import Sliced


@torch.no_grad()
def pull(source: str | Path, model: nn.Module) -> nn.Module:
    """Write trained values into `model`, in place, from a checkpoint, or the initial values from a `.pte`.

    `model` may have `Sliced` layers, which are merged, or be the plain model from which they were made.
    """
    source = Path(source)
    if source.suffix == ".pte":
        program = TrainingProgram(source)
        state, slices = program.state(), program.artifact.training.slices
    else:
        state, slices = read_checkpoint(source)
    by_layer = {s.layer: s for s in slices}
    for name, value in state.items():
        if name == STEP or (parameter_of(name) != name and parameter_of(name) in state):
            continue  # the optimizer's
        _write(model, name, value, by_layer)
    return merge(model, lambda layer: isinstance(layer, Sliced))


def _write(model: nn.Module, name: str, value: Tensor, slices: dict[str, SliceSpec]) -> None:
    layer, _, key = name.rpartition(".")
    parameters = dict(model.named_parameters())
    if name in parameters and parameters[name].shape == value.shape:
        parameters[name].copy_(value)
        return
    plain = layer.removesuffix(".base") if layer != "base" else ""
    weight = parameters.get(f"{layer}.weight".lstrip("."))
    if key == "slice" and layer in slices and weight is not None:
        part = slices[layer]
        weight.index_copy_(part.dim, torch.tensor(part.indices), value)
        return
    unwrapped = parameters.get(f"{plain}.{key}".lstrip("."))
    if plain != layer and unwrapped is not None and unwrapped.shape == value.shape:
        unwrapped.copy_(value)
        return
    raise EdgetuneError(
        "the model has no parameter of this name and shape",
        got=f"{name} {tuple(value.shape)}",
        allowed=sorted(parameters),
        action="pull into the model that was exported",
        exit_code=Exit.EXPORT,
    )
