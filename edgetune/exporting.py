"""`edgetune export MODEL`: a model by name, a run's folder or a saved program, with example inputs, to `export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from edgetune import registry
from edgetune.technique import EdgetuneError, Exit, Inputs

if TYPE_CHECKING:
    from edgetune.export import Artifact

CHECK_ROWS = 100
OWN_DATA = {"minilm": "tweets", "smollm2": "conversations", "effnet-lite0": "fashion-mnist"}
ACCEPTED = "minilm, smollm2, effnet-lite0, hf:PATH, timm:NAME, a run's folder, or a .pt2 file"


@dataclass(frozen=True)
class Exportable:
    """A model in eval mode, one example, and rows to compare on (none: the example)."""

    model: nn.Module
    example: Inputs
    check_inputs: Sequence[Inputs] | None = None


class _Program(nn.Module):
    """A program of `torch.export`, which has one mode only and refuses `eval()`."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.program(*args, **kwargs)

    def train(self, mode: bool = True) -> _Program:
        self.training = mode
        return self


def export_from(
    source: str, path: Path, *, device: str | None = None, target: str | None = None, data: str | None = None
) -> Artifact:
    """Lower what `source` names to `path`.

    Args:
        source: a `.pt2` that `torch.export.save` wrote, the folder of a finished run, or a model of the
            registry (`minilm`, `hf:PATH`, `timm:NAME`).
        path: the `.pte` to write.
        device: lower for its preferred target.
        target: lower for this one instead.
        data: for a model of the registry: what gives the classes, and the rows to compare on.
    """
    from edgetune.export import export

    found = exportable(source, data)
    inputs = found.check_inputs
    return export(found.model, found.example, path, device=device, target=target, check_inputs=inputs)


def exportable(source: str, data: str | None = None) -> Exportable:
    """The model that `source` names; see `export_from`."""
    place = Path(source)
    if source.endswith(".pt2"):
        return _saved(place)
    if source.partition(":")[0] in registry.MODELS:
        return _by_name(source, data)
    if place.is_dir():
        if not (place / "recipe.yaml").is_file():
            action = "give a run's folder, or write hf:PATH for a model's folder"
            raise EdgetuneError("this folder holds no run", got=source, action=action)
        from edgetune.pipeline import restore

        found = restore(place)
        return Exportable(found.model, found.example, found.check_inputs)
    raise EdgetuneError(f"unknown model; accepted are {ACCEPTED}", got=source, allowed=registry.MODELS)


def _saved(path: Path) -> Exportable:
    import torch

    if not path.is_file():
        raise EdgetuneError("no such file", got=str(path))
    try:
        program = torch.export.load(path)
    except Exception as error:  # a damaged archive raises almost anything
        what = f"cannot be read as a program of torch.export ({type(error).__name__}: {str(error).splitlines()[0]})"
        raise EdgetuneError(what, got=str(path), action="save it with torch.export.save") from error
    if program.example_inputs is None:
        raise EdgetuneError("the program holds no example inputs", got=str(path), exit_code=Exit.EXPORT)
    args, kwargs = program.example_inputs
    if args and kwargs:
        raise EdgetuneError(
            "inputs by position and by name together are not read", got=str(path), exit_code=Exit.EXPORT
        )
    return Exportable(_Program(program.module()).eval(), dict(kwargs) if kwargs else tuple(args))


def _by_name(source: str, data: str | None) -> Exportable:
    import torch

    from edgetune.data.dataset import DataSettings, Split
    from edgetune.models.loaded import ModelSettings

    data = data or OWN_DATA.get(source.partition(":")[0])
    if data is None:
        action = "pass --data, such as --data csv:rows.csv: it gives the classes, and the rows to compare on"
        raise EdgetuneError(f"{source} needs data", action=action)
    dataset = registry.loader(registry.DATASETS, "data", data)(DataSettings(source=data))
    settings = ModelSettings(source=source)
    torch.manual_seed(0)
    loaded = registry.loader(registry.MODELS, "model", source)(settings, dataset)
    split = Split(dataset.task, dataset.test, loaded.encode)
    rows = [split.one_row(i, settings.max_length) for i in range(min(CHECK_ROWS, len(split)))]
    return Exportable(loaded.model, rows[0], rows)
