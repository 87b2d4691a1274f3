"""The model of a recipe: for the task of its data, or a language model where a step puts a classifier on one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgetune.core import registry
from edgetune.core.errors import EdgetuneError
from edgetune.data.dataset import Dataset
from edgetune.models.loaded import LoadedModel
from edgetune.recipe.recipe import Recipe
from edgetune.tasks.causal_lm import CausalLM
from edgetune.tasks.task import Task
from edgetune.tasks.text_classification import TextClassification
from edgetune.train.loop import seed_everything


def load_model(recipe: Recipe, dataset: Dataset) -> LoadedModel:
    """The model that the recipe names, with a head for `task_to_load`, drawn by the recipe's seed."""
    task = task_to_load(recipe, dataset.task)
    seed_everything(recipe.seed)
    load: Any = registry.loader(registry.MODELS, "model", recipe.model.source)
    loaded: LoadedModel = load(recipe.model, replace(dataset, task=task))
    return loaded


def has_guard(recipe: Recipe) -> bool:
    """Whether a step puts a classifier on a language model."""
    return any(getattr(step.settings, "guards", False) for step in recipe.steps)


def task_to_load(recipe: Recipe, task: Task) -> Task:
    """The task that the model is to do as it is loaded. Raises for a guard that does not fit the recipe's `task`."""
    if not has_guard(recipe):
        return task
    first, *rest = recipe.steps
    guard: Any = first.settings
    if not getattr(guard, "guards", False):
        name = next(step.name for step in rest if getattr(step.settings, "guards", False))
        message = f"until {name} the model is a language model, which cannot be measured on classes"
        raise EdgetuneError(message, got=first.name, action=f"make {name} the first step")
    if not isinstance(task, TextClassification):
        message = f"{first.name} learns from texts with classes, and the rows are {task.rows}"
        raise EdgetuneError(message, got=task.name, action="name the column of the classes: data: {label: COLUMN}")
    if guard.classes != task.labels:
        raise EdgetuneError(
            f"{first.name}.classes are not the classes of the data", got=guard.classes, allowed=task.labels, near="",
            action=f"write classes: [{', '.join(task.labels)}]",
        )  # fmt: skip
    return CausalLM()
