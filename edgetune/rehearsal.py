"""All steps of a recipe once, on a copy that nothing trains: what would stop a late step stops the run before training.

Widths that a cut leaves and a group size does not divide, a layer that cannot be quantized, a step that leaves nothing
to train: none of it depends on what a training learns. Only a recipe that does something after a training is rehearsed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from edgetune.attach import apply, closes, finalize, opened
from edgetune.modes import undisturbed
from edgetune.recipe import Recipe
from edgetune.technique import EdgetuneError, Inputs, Sample, Technique, call
from edgetune.train import Train, seed_everything, trainable_parameters


def rehearse(
    recipe: Recipe,
    model: nn.Module,
    sample: Sample,
    example: Inputs,
    progress: Callable[[str, int, int, str], None],
) -> None:
    """Apply and finalize every step to a copy of `model`, and run the result once on `example`.

    Raises the `EdgetuneError` of the step, which says that nothing was trained yet.
    """
    trains = [number for number, step in enumerate(recipe.steps) if isinstance(step.settings, Train)]
    if not trains or trains[0] == len(recipe.steps) - 1:
        return
    model = copy.deepcopy(model)
    for number, step in enumerate(recipe.steps, 1):
        progress("rehearse", number - 1, len(recipe.steps), step.name)
        seed_everything(recipe.seed)
        try:
            model = _rehearsed(model, step.settings, sample)
        except EdgetuneError as error:
            where = f"{recipe.name}, step {number}"  # a technique's error names it already
            error.within(where if isinstance(step.settings, Technique) else f"{where}, {step.name}")
            error.what += " (seen before anything was trained)"
            raise
    model = finalize(model).eval()
    with undisturbed(model), torch.no_grad():
        call(model, example)
    progress("rehearse", len(recipe.steps), len(recipe.steps), "")


def _rehearsed(model: nn.Module, settings: object, sample: Sample) -> nn.Module:
    if closes(settings, [technique.name for technique in opened(model)]):
        model = finalize(model)
    if isinstance(settings, Technique):
        return apply(model, settings, sample)
    if isinstance(settings, Train):
        trainable_parameters(model)
        return model
    return finalize(model) if getattr(settings, "name", "") == "finalize" else model
