"""What a model loader returns, and the settings that it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.hub import check_hub
from edgetune.core.other_names import nearest_file
from edgetune.core.quiet import silence_libraries
from edgetune.core.technique import Settings
from edgetune.data.dataset import Dataset
from edgetune.data.rows import Encode
from edgetune.tasks.causal_lm import CausalLM
from edgetune.tasks.task import Task
from edgetune.tasks.text_classification import TextClassification


class ModelSettings(Settings):
    """The model, and the form of its inputs."""

    source: str
    """A model that comes with edgetune (`minilm`, `smollm2`, `effnet-lite0`), `hf:OWNER/NAME` from the Hugging Face
    hub, a local `hf:FOLDER`, `timm:NAME`, or `py:FILE.py:FUNCTION`, a function that builds the module. Paths
    are relative to the recipe."""
    max_length: int = Field(default=64, ge=8, le=8192)
    """Maximum length of a text, in tokens; longer texts are truncated."""
    image_px: int = Field(default=112, ge=8, le=2048)
    """Width and height of an image, in pixels."""
    image_channels: Literal[1, 3] = 3
    """Channels of an image. 3: RGB; a greyscale image gets the same values in all channels. 1: greyscale; `timm`
    and `py` only."""
    layers: int | None = Field(default=None, ge=1)
    """Keep only the first blocks, this many, for quick experiments; `null`: all. `smollm2` only."""
    pretrained: bool = True
    """`false`: random weights, to test shapes, size and speed. `hf` and `timm` only."""
    head: Literal["keep", "new"] | None = None
    """What to do with the trained head of a classifier. `null`: keep it if its classes have the same names as those
    of the data. `new`: start with a new head. `keep`: keep a head that does not name its classes; they are taken
    from the data, in the order of the data. A model without a trained head always gets a new one. `hf` and
    `timm` only."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode and fp32, and the encoder that turns rows into its inputs.

    A new head is drawn from torch's random generator: seed it before loading to get the same one again.
    """

    name: str
    model: nn.Module
    encode: Encode
    notes: tuple[str, ...] = ()
    licence: str = ""  # of the pretrained weights, as their package says; empty: it does not
    classes: Mapping[str, str] | None = None  # of a kept head, in its order: its own name, and the data's

    def relabel(self, dataset: Dataset) -> Dataset:
        """The data with the classes of the model's outputs, under their names and in their order."""
        return dataset if self.classes is None else dataset.with_classes(self.classes)


def import_class(transformers: Any, name: str) -> Any:
    """A class of transformers, whose file is imported only now; the error says why that failed."""
    try:
        with silence_libraries():
            return getattr(transformers, name)
    except (ImportError, RuntimeError) as error:
        cause = error.__cause__ or error
        raise EdgetuneError(
            f"transformers cannot import its {name} ({cause})",
            # with Pillow there, transformers also imports torchvision, and a build for another torch breaks it
            action="pip uninstall torchvision, or install the build made for this torch"
            if "torchvision" in str(cause)
            else "pip install 'edgetune[text]'",
        ) from error


@contextmanager
def explain_load_errors(source: str, name: str, fetches: bool = True) -> Iterator[None]:
    """Turn a library's errors about a name that it cannot load, online or offline, into one clear error.

    `name` is the path or the hub id in `source`. A hub that does not respond is tried once.
    """
    if not name:
        raise EdgetuneError(
            f"{source} does not name a model", action="write hf:OWNER/NAME, or hf:FOLDER for one on this disk"
        )
    with silence_libraries(), check_hub(name, fetches) as silence:
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, EdgetuneError):
                raise
            why = str(error).splitlines()[0]
            if silence:
                why = f"it is not on this disk, and the Hugging Face hub does not respond ({silence})"
            near = nearest_file(Path(name).expanduser(), folders=True)
            action = "check the id and the network, or give the path of a local folder"
            if Path(name).expanduser().is_dir():
                action = "give a folder written by save_pretrained: config.json, the weights, the tokenizer"
            raise EdgetuneError(
                f"the model {source} could not be loaded: {why}",
                near=f"hf:{Path(name).with_name(near)}" if near else "",
                action=action,
            ) from error


def check_task(tasks: tuple[type[Task], ...], model: str, task: Task) -> None:
    """Raise unless the model has a head for the task of the data set."""
    if not isinstance(task, tasks):
        takes = " or ".join(own.rows for own in tasks)
        action = f"choose {task.models}, or other data"
        if isinstance(task, TextClassification) and CausalLM in tasks:
            action = "write label: null in data, to train on the texts alone, or choose minilm or hf:PATH"
        raise EdgetuneError(
            f"{model} cannot do the task of this data set: the rows are {task.rows}, and it takes {takes}",
            action=action,
        )


def refuse_argument(model: str, argument: str) -> None:
    """Raise if something follows the colon of a model that takes no argument."""
    if argument:
        raise EdgetuneError(f"{model} takes no argument after a colon", got=argument, action=f"write source: {model}")


def refuse_settings(model: str, settings: ModelSettings, *names: str) -> None:
    """Raise if a setting that this loader does not use was changed."""
    for name in names:
        if getattr(settings, name) != ModelSettings.model_fields[name].default:
            raise EdgetuneError(f"{model} does not take model.{name}", action=f"leave model.{name} out")


def check_max_length(max_length: int, positions: int | None) -> None:
    """Raise if texts could have more tokens than the model has positions."""
    if positions is not None and max_length > positions:
        raise EdgetuneError(
            "model.max_length exceeds the positions of the model",
            got=max_length,
            action=f"set model.max_length to at most {positions}",
        )


def licence_of(package: str) -> str:
    """The licence in an installed package's metadata; empty if there is none."""
    try:
        fields = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        return ""
    values = [fields[field] for field in ("License-Expression", "License") if field in fields]
    # some packages put the whole text there
    return next((line for line in values if line not in ("", "UNKNOWN") and "\n" not in line), "")
