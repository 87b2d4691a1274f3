"""The model that a run ended with, stored with its history: opening a run trains, prunes and quantizes nothing.

`finished/` in the run's folder holds the tensors (`model.safetensors`, quantized ones in torchao's own layout) or, for
a model that has become a graph, `model.pt2`; and `structure.json`, the history of the recipe's model. The structure is
restored by `Technique.rebuild` of each technique.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edgetune.core import registry
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.files import write_atomically
from edgetune.core.inputs import Inputs, tensors_of
from edgetune.core.layers import unwrapped_name
from edgetune.core.ledger import Ledger
from edgetune.core.quiet import silence_libraries
from edgetune.core.technique import Settings, Technique
from edgetune.data.dataset import Dataset, Split
from edgetune.data.rows import Rows
from edgetune.models.chat import drop_truncated_answers
from edgetune.models.loaded import LoadedModel
from edgetune.models.metadata import describe_io
from edgetune.prune.structure import hand_over, history_of
from edgetune.quant.int8 import Static8
from edgetune.recipe.recipe import Recipe, load, settings_class
from edgetune.recipe.sections import ExportSettings
from edgetune.run import runs
from edgetune.run.exportable import Exportable, exportable_from_split
from edgetune.run.loading import load_model
from edgetune.tasks.task import Task

FOLDER, WEIGHTS, GRAPH, STRUCTURE = "finished", "model.safetensors", "model.pt2", "structure.json"


class Structure(Settings):
    """The contents of `structure.json`: the model's form, its history, and the task of its data."""

    format: Literal[1] = 1
    graph: bool  # the model is a graph, in `model.pt2`
    packed: bool  # some tensors are torchao's
    shared: dict[str, str]  # names of tensors that are another one, by its first name
    history: tuple[tuple[str, dict[str, Any]], ...]  # each technique and its settings, in order
    task: str  # its name
    values: dict[str, Any]  # of the task: its labels in the order of the data, and what it learned from training rows
    config: dict[str, Any] = {}  # noqa: RUF012  pydantic copies it; of a model of transformers: its config as it ended
    cuts: tuple[dict[str, dict[str, Any]], ...] = ()  # what pruning left of the model's structure, in order

    def make_task(self) -> Task:
        """The task of the run, in the order of the data."""
        task: Task = registry.load(registry.TASKS[self.task])(**{**self.values, "labels": tuple(self.values["labels"])})
        return task


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, opened: its model in eval mode, its ledger, and its history."""

    folder: Path
    recipe: Recipe
    ledger: Ledger
    structure: Structure
    loaded: LoadedModel

    @property
    def model(self) -> nn.Module:
        """The model that the run ended with."""
        return self.loaded.model

    @property
    def history(self) -> tuple[Technique, ...]:
        """The techniques that were applied, in order."""
        return tuple(settings_class(name)(**settings) for name, settings in self.structure.history)  # type: ignore[misc]

    @cached_property
    def dataset(self) -> Dataset:
        """The recipe's data, read again, with the task as the run fitted it."""
        data, task = self.recipe.data, self.structure.make_task()
        dataset: Dataset = registry.loader(registry.DATASETS, "data", data.source)(data)
        if dataset.task.labels != task.labels:
            raise EdgetuneError(
                "the data has other classes than the run learned",
                where=dataset.name,
                got=dataset.task.labels,
                allowed=task.labels,
                action="restore the data that the run was made with",
                exit_code=Exit.DATA,
            )
        dataset = self.loaded.relabel(replace(dataset, task=task))
        return drop_truncated_answers(dataset, self.loaded.encode, self.loaded.name, data.max_bad_rows_pct)

    def exportable(self, language: bool = False) -> Exportable:
        """The model and the rows to compare its program on. `language`: as a text-generation program in any case."""
        dataset = self.dataset
        split = Split(dataset.task, dataset.test, self.loaded.encode)
        settings = self.recipe.export or ExportSettings(check_rows=min(64, len(split)))
        metadata = describe_io(self.loaded, dataset, self.recipe.name)
        return exportable_from_split(self.model, split, self.recipe.model.max_length, settings, metadata, language)


def save_finished(folder: Path, model: nn.Module, recipe: Recipe, dataset: Dataset, example: Inputs) -> None:
    """Store the model of a run next to its ledger. `dataset`: as its loader returned it."""
    structure = Structure(
        graph=isinstance(model, Static8),
        packed=any(type(tensor) is not Tensor for tensor in model.state_dict().values()),
        shared=_tied_tensors(model),
        history=tuple(
            (step.name, step.settings.model_dump(mode="json"))
            for step in recipe.steps
            if isinstance(step.settings, Technique)
        ),
        task=dataset.task.name,
        values=asdict(dataset.task),
        config=_config(model),
        cuts=tuple(history_of(model)),
    )
    target = folder / FOLDER
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    if isinstance(model, Static8):
        model.write(target / GRAPH, tensors_of(example))
    else:
        repeated = set(structure.shared)
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in repeated}
        kinds: dict[str, str] = {}
        if structure.packed:
            with silence_libraries():
                state, kinds = _torchao().flatten_tensor_state_dict(state)
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
        save_file(tensors, target / WEIGHTS, metadata=kinds)
    write_atomically(target / STRUCTURE, structure.model_dump_json(indent=1))  # last: what it names is whole


def open_run(folder: str | Path) -> FinishedRun:
    """Open a finished run: the exact model that it ended with, without repeating any work.

    Args:
        folder: the run's folder. The recipe's model source must exist; its data is only read by `exportable`.

    Raises:
        EdgetuneError: the folder contains no finished run, or the stored model does not match the recipe's model.
    """
    folder = Path(folder)
    ledger = runs.read_ledger(folder)
    if ledger is None or not ledger.finished:
        action = f"edgetune run RECIPE --resume --out {folder}"
        raise EdgetuneError("the folder does not contain a finished run", got=str(folder), action=action)
    recipe, structure = load(folder / "recipe.yaml"), _read_structure(folder)
    rows = Rows([])
    dataset = Dataset(ledger.data, structure.make_task(), rows, rows, rows)
    loaded = load_model(recipe, dataset)
    run = FinishedRun(folder, recipe, ledger, structure, loaded)
    return replace(run, loaded=replace(loaded, model=_rebuild(run).eval()))


def _read_structure(folder: Path) -> Structure:
    path = folder / FOLDER / STRUCTURE
    action = f"make it again: edgetune run {folder / 'recipe.yaml'} --resume --from export --out {folder}"
    try:
        return Structure.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EdgetuneError("the run has no stored model", where=str(path), action=action) from error
    except (ValidationError, UnicodeDecodeError) as error:
        message = "the stored model cannot be read: it is damaged, or of another version"
        raise EdgetuneError(message, where=str(path), action=action) from error


def _rebuild(run: FinishedRun) -> nn.Module:
    """The stored model: the structure of the loaded one after each technique, with the stored tensors."""
    stored = run.folder / FOLDER
    if run.structure.graph:
        return Static8.read(stored / GRAPH)
    with safe_open(stored / WEIGHTS, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        if run.structure.packed:
            with silence_libraries():
                state, _ = _torchao().unflatten_tensor_state_dict(state, file.metadata())
    state |= {name: state[first] for name, first in run.structure.shared.items()}
    model = run.model
    names = {unwrapped_name(name): tensor for name, tensor in state.items()} | state  # also as earlier techniques knew
    hand_over(model, run.structure.cuts)
    for technique in run.history:
        model = technique.rebuild(model, names)
    config = getattr(model, "config", None)
    for name, value in run.structure.config.items():
        if getattr(config, name, None) != value:
            setattr(config, name, value)
    _add_missing(model, state)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise EdgetuneError(
            f"the stored model does not fit the recipe's model: {str(error).splitlines()[-1].strip()}",
            where=str(stored),
            action="restore the model source that the run was made with",
            exit_code=Exit.DATA,
        ) from error
    for name, first in run.structure.shared.items():
        (layer, _, key), (other, _, other_key) = name.rpartition("."), first.rpartition(".")
        setattr(model.get_submodule(layer), key, getattr(model.get_submodule(other), other_key))
    return model.requires_grad_(False)


def _add_missing(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Add parameters that a technique added to layers, such as the bias of a merged adapter."""
    for name in state:
        layer, _, key = name.rpartition(".")
        try:
            module = model.get_submodule(layer)
        except AttributeError:
            continue  # load_state_dict names it
        if key in module._parameters and module._parameters[key] is None:
            module._parameters[key] = nn.Parameter(torch.empty_like(state[name]), requires_grad=False)


def _tied_tensors(model: nn.Module) -> dict[str, str]:
    """Every name of a tied tensor but the first, with the first."""
    firsts: dict[int, str] = {}
    named = model.state_dict(keep_vars=True).items()
    return {name: first for name, tensor in named if (first := firsts.setdefault(id(tensor), name)) != name}


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if not callable(getattr(config, "to_json_string", None)):
        return {}
    plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))  # type: ignore[union-attr]
    return {name: v for name, v in plain.items() if hasattr(config, name) and getattr(config, name) == v}


def _torchao() -> Any:
    return registry.require("torchao.prototype.safetensors.safetensors_support", "a quantized model on disk")
