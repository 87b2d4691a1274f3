"""Run all steps of a recipe once on an untrained copy, so that a late step fails before the training.

A width that a group size does not divide, a layer that cannot be quantized, a step that leaves nothing to train: none
of
this depends on what a training learns. A recipe that trains nothing is not rehearsed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from edgetune.core import registry
from edgetune.core.apply import apply, finalize
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs, call
from edgetune.core.modes import preserve_state
from edgetune.core.order import plan_steps
from edgetune.core.technique import Sample, Technique
from edgetune.export.targets import find
from edgetune.profile.device import load as load_device
from edgetune.quant.size import stored_bytes
from edgetune.recipe.recipe import Recipe
from edgetune.train import loggers
from edgetune.train.distill import check_hidden
from edgetune.train.loop import seed_everything, trainable_parameters
from edgetune.train.optimizer import faster_parameters
from edgetune.train.settings import Train


def check_reachable(recipe: Recipe) -> None:
    """Check what is only needed at the end before any work: the report's library, the target, the devices."""
    registry.require("plotly", "the report")
    for step in recipe.steps:
        loggers.check(step.settings.log if isinstance(step.settings, Train) else ())
    if recipe.export:
        registry.require("executorch", "export")
        find(recipe.export.target).partitioners()
    for name in recipe.profile.devices if recipe.profile else ():
        load_device(name)


def rehearse(
    recipe: Recipe,
    model: nn.Module,
    sample: Sample,
    example: Inputs,
    progress: Callable[[str, int, int, str], None],
) -> int:
    """Apply and finalize every step on a copy of `model`, and run the result once on `example`.

    Returns the minimum number of bytes that a run writes: two checkpoints of each training, with the optimizer's two
    moments, the stored model and the program. Raises the `EdgetuneError` of the step, with a note that nothing was
    trained.
    """
    if not any(isinstance(step.settings, Train) for step in recipe.steps):
        return 0
    model, written_bytes = copy.deepcopy(model), 0
    teachers: dict[str, nn.Module | None] = dict.fromkeys(_teachers_of_hidden_states(recipe))
    for move in plan_steps([step.settings for step in recipe.steps]):
        step = recipe.steps[move.index]
        progress("rehearse", move.index, len(recipe.steps), step.name)
        seed_everything(recipe.seed)
        if step.name in teachers and teachers[step.name] is None:
            teachers[step.name] = copy.deepcopy(model)
        try:
            with name_step_in_errors(recipe, move.index + 1):
                if move.finalizes:
                    model = finalize(model)
                elif isinstance(step.settings, Technique):
                    model = apply(model, step.settings.for_rehearsal(), sample)
                elif isinstance(step.settings, Train):
                    faster_parameters(step.settings, model)
                    distill = step.settings.distill
                    if distill is not None and (teacher := teachers.get(distill.teacher)) is not None:
                        check_hidden(model, teacher, distill, example)
                    written_bytes += 2 * 3 * sum(parameter.nbytes for parameter in trainable_parameters(model))
        except EdgetuneError as error:
            error.what += " (found before any training)"
            raise
    model = finalize(model).eval()
    with preserve_state(model), torch.no_grad():
        call(model, example)
    progress("rehearse", len(recipe.steps), len(recipe.steps), "")
    return written_bytes + stored_bytes(model) * (2 if recipe.export else 1)


def _teachers_of_hidden_states(recipe: Recipe) -> set[str]:
    """The steps before which the model is a teacher of hidden states."""
    distilled = [step.settings.distill for step in recipe.steps if isinstance(step.settings, Train)]
    return {each.teacher for each in distilled if each is not None and each.hidden}


@contextmanager
def name_step_in_errors(recipe: Recipe, number: int) -> Iterator[None]:
    """Add the step of the recipe, counted from one, to the location of errors inside."""
    step = recipe.steps[number - 1]
    try:
        yield
    except EdgetuneError as error:
        where = f"{recipe.name}, step {number}"  # a technique's error names it already
        error.within(where if isinstance(step.settings, Technique) else f"{where}, {step.name}")
        raise
