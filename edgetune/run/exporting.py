"""`edgetune export MODEL`: load a model by name, a run's folder or a saved program, and export it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from edgetune.adapt.loading import load_adapter
from edgetune.core import registry
from edgetune.core.apply import finalize
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.floats import check_types
from edgetune.core.other_names import nearest_file, nearest_source
from edgetune.core.quiet import silence_libraries
from edgetune.recipe.sections import LANGUAGE_CHECK_ROWS
from edgetune.run.exportable import (
    CHECK_ROWS,
    Exportable,
    GenerationSettings,
    prompts_from_texts,
    set_cache,
    to_program,
    tokenizer_of,
)

if TYPE_CHECKING:
    from edgetune.capture.dynamic import Dynamic
    from edgetune.core.floats import FloatType, KeyValueType
    from edgetune.data.dataset import Dataset
    from edgetune.export import Artifact
    from edgetune.program.manifest import AdapterForm

OWN_DATA = {"minilm": "tweets", "smollm2": "conversations", "effnet-lite0": "fashion-mnist"}
CONVERTED = ("hf", "timm", "py")  # exported without data
ACCEPTED = "minilm, smollm2, effnet-lite0, hf:PATH, timm:NAME, py:FILE.py:FUNCTION, a run's folder, or a .pt2 file"
_WEIGHTS = "weights alone are not a model: export py:FILE.py:FUNCTION --weights FILE"
NO_MODELS = {  # by suffix, with the advice
    **dict.fromkeys((".pt", ".pth", ".bin", ".safetensors", ".ckpt"), _WEIGHTS),
    **dict.fromkeys(
        (".pte", ".onnx", ".tflite", ".gguf", ".h5", ".keras"), "give the model that the file was exported from"
    ),
    **dict.fromkeys((".csv", ".tsv", ".json", ".jsonl"), "give rows with --data: export MODEL --data csv:FILE"),
    **dict.fromkeys((".yaml", ".yml"), "run a recipe with: edgetune run FILE"),
}


class _Program(nn.Module):
    """A program of `torch.export`, which has a single mode and refuses `eval()`."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.program(*args, **kwargs)

    def train(self, mode: bool = True) -> _Program:
        self.training = mode
        return self


def export_from(
    source: str,
    path: Path,
    *,
    device: str | None = None,
    target: str | None = None,
    data: str | None = None,
    inputs: str | None = None,
    weights: Path | None = None,
    language: bool = False,
    max_tokens: int | None = None,
    dynamic: Dynamic | None = None,
    external_data: bool = False,
    dtype: FloatType | None = None,
    cache_dtype: KeyValueType | None = None,
    fastest_form: bool = False,
    adapters: Mapping[str, Path] | Path | None = None,
    form: AdapterForm | None = None,
    adapter_rank: int | None = None,
) -> Artifact:
    """Lower the model that `source` names to `path`.

    Args:
        source: a `.pt2` file of `torch.export.save`, the folder of a finished run, a function that builds a module
            (`py:file.py:build`), or a model of the registry (`minilm`, `hf:PATH`, `timm:NAME`).
        path: the `.pte` to write.
        device: lower for its preferred target.
        target: lower for this one instead.
        data: for a model of the registry: provides the classes, and the rows to compare on. A finished model needs
            none: it has its own classes, and check inputs are generated unless `inputs` gives them.
        inputs: `py:file.py:function`, which returns an input of the model, or a list of them, to compare on.
        weights: the state dict of a `py:` model, in a `.safetensors` or `.pt` file.
        language: export a text-generation program; a run whose recipe does so needs no flag.
        max_tokens: cache size of a text-generation program, in tokens; by default that of the run, or 512.
        dynamic: sizes that may differ between calls, as in `et.export`.
        external_data: store the weights in `model.ptd` next to the program.
        dtype: the type that the program computes in; by default that of the run, or fp32.
        cache_dtype: the type of a text-generation program's cache; by default that of the run, or `dtype`.
        fastest_form: quantize the model first, if that is faster; see `choose_fastest`.
        adapters: adapters by name, as in `et.export`; or the folder of one, which is merged into the model.
        form: how the program gets one of several adapters, as in `et.export`; by default as inputs.
        adapter_rank: of the LoRAs in place of adapters of other families, as in `et.export`.
    """
    check_types(dtype, cache_dtype)
    for option, value in (("--form", form), ("--adapter-rank", adapter_rank)):
        if value is not None and not isinstance(adapters, Mapping):
            action = f"write --adapter NAME=FOLDER, or leave out {option}"
            raise EdgetuneError(f"{option} is for adapters with a name", got=value, action=action)
    if fastest_form and isinstance(adapters, Mapping):
        message = "the fastest form may be one without layers for the adapters"
        raise EdgetuneError(message, action="leave out --fastest-form, or merge one adapter: --adapter FOLDER")
    model = set_cache(load_exportable(source, data, language, inputs, weights), max_tokens, cache_dtype)
    if isinstance(adapters, Path):
        model = replace(model, model=finalize(load_adapter(model.model, adapters)).eval())
    elif adapters is not None:
        model = replace(model, adapters=adapters, form=form or "inputs", adapter_rank=adapter_rank)
    if model.generation is not None and (dynamic or external_data):
        message = "a text-generation program takes prompts of any length and contains its weights"
        raise EdgetuneError(message, action="leave out --dynamic and --ptd, or --language")
    model = replace(model, dynamic=dynamic, external_data=external_data, dtype=dtype or model.dtype)
    if fastest_form:
        if source.endswith(".pt2"):
            message = "a program of torch.export has no layers to quantize"
            raise EdgetuneError(message, got=source, action="export the model itself, or omit --fastest-form")
        from edgetune.run.forms import choose_fastest

        model = choose_fastest(model, device=device, target=target)
    return to_program(model, path, device=device, target=target)


def parse_adapters(asked: Sequence[str]) -> dict[str, Path] | Path | None:
    """Adapters of the command line: by name, or the folder of an only one without a name.

    >>> parse_adapters(["en=runs/en", "legal=runs/legal"]) == {"en": Path("runs/en"), "legal": Path("runs/legal")}
    True
    >>> parse_adapters(["runs/en"]) == Path("runs/en")
    True
    """
    pairs = [one.partition("=") for one in asked]
    if not pairs:
        return None
    if len(pairs) == 1 and (not pairs[0][1] or Path(asked[0]).is_dir()):
        return Path(asked[0])
    names = [name for name, _, folder in pairs if folder]
    if len(set(names)) < len(pairs):
        raise EdgetuneError(
            "several adapters need a name each",
            got=list(asked),
            action="write --adapter en=FOLDER --adapter legal=FOLDER",
        )
    return {name: Path(folder) for name, _, folder in pairs}


def load_exportable(
    source: str,
    data: str | None = None,
    language: bool = False,
    inputs: str | None = None,
    weights: Path | None = None,
) -> Exportable:
    """The model that `source` names; see `export_from`."""
    place, kind = Path(source), source.partition(":")[0]
    if (inputs or weights) and (kind not in CONVERTED or data or language):
        message = "--inputs and --weights are for models that are exported without data"
        raise EdgetuneError(message, got=source, action="leave out --inputs and --weights, or --data and --language")
    if source.endswith(".pt2"):
        if language:
            raise EdgetuneError(
                "a program of torch.export has no tokenizer and no cache, so it cannot generate text",
                got=source,
                action="export the model itself: hf:PATH --language, or et.export_language(model, tokenizer, path)",
            )
        return _from_pt2(place)
    if kind in CONVERTED and data is None and not language:
        from edgetune.run.converting import convert_model

        return convert_model(source, inputs, weights)
    if kind in registry.MODELS:
        return _from_registry(source, data, language)
    if place.is_dir():
        if not (place / "recipe.yaml").is_file():
            action = "give a run's folder, or write hf:PATH for a model's folder"
            near = f"hf:{source}" if (place / "config.json").is_file() else ""
            raise EdgetuneError("this folder does not contain a run", got=source, near=near, action=action)
        from edgetune.run.finished import open_run

        opened = open_run(place)
        # the run measured its own program, not this one
        return replace(opened.exportable(language), ledger=opened.ledger.with_(measured=(), predicted=()))
    action = NO_MODELS.get(place.suffix.lower(), "")
    near = "" if action else nearest_source(source, registry.MODELS, data=False)
    near = f"py:{source}:build" if place.suffix == ".py" and not near.startswith("py:") else near
    raise EdgetuneError(f"unknown model; accepted are {ACCEPTED}", got=source, near=near, action=action)


def _from_pt2(path: Path) -> Exportable:
    import torch

    if not path.is_file():
        raise EdgetuneError(
            "no such file", got=str(path), near=nearest_file(path), action="write it with torch.export.save"
        )
    try:
        with silence_libraries():
            program = torch.export.load(path)
    except Exception as error:  # a damaged archive raises almost anything
        message = f"cannot be read as a program of torch.export ({type(error).__name__}: {str(error).splitlines()[0]})"
        raise EdgetuneError(message, got=str(path), action="save it with torch.export.save") from error
    if program.example_inputs is None:
        raise EdgetuneError("the program has no example inputs", got=str(path), exit_code=Exit.EXPORT)
    args, kwargs = program.example_inputs
    if args and kwargs:
        raise EdgetuneError("inputs by position and by name cannot be combined", got=str(path), exit_code=Exit.EXPORT)
    return Exportable(_Program(program.module()).eval(), dict(kwargs) if kwargs else tuple(args), one_row=False)


def _from_registry(source: str, data: str | None, language: bool) -> Exportable:
    import torch

    from edgetune.data.dataset import Split
    from edgetune.data.settings import DataSettings
    from edgetune.models.loaded import ModelSettings
    from edgetune.models.metadata import describe_io

    data = data or OWN_DATA.get(source.partition(":")[0])
    dataset = (
        _empty_dataset()
        if data is None
        else registry.loader(registry.DATASETS, "data", data)(DataSettings(source=data))
    )
    settings = ModelSettings(source=source)
    torch.manual_seed(0)
    loaded = registry.loader(registry.MODELS, "model", source)(settings, dataset)
    dataset = loaded.relabel(dataset)
    split, metadata = Split(dataset.task, dataset.test, loaded.encode), describe_io(loaded, dataset)
    by = f"{data} gave the classes and the rows to compare on, " if data else ""
    untrained = f"exported as loaded: {by}nothing was trained"
    metadata = metadata.model_copy(update={"notes": (untrained, *metadata.notes)})
    if language:
        tokenizer = tokenizer_of(dataset.task, loaded.encode)
        prompts = prompts_from_texts(split, min(LANGUAGE_CHECK_ROWS, len(split)))
        example = loaded.encode(["An example."])
        return Exportable(
            loaded.model, example, generation=GenerationSettings(tokenizer, prompts=prompts), carried=metadata
        )
    rows = [split.one_row(i, settings.max_length) for i in range(min(CHECK_ROWS, len(split)))]
    return Exportable(loaded.model, rows[0], rows, carried=metadata)


def _empty_dataset() -> Dataset:
    """A data set without rows, for a language model: it needs no classes."""
    from edgetune.data.dataset import Dataset
    from edgetune.data.rows import Rows
    from edgetune.tasks.causal_lm import CausalLM

    none = Rows([])
    return Dataset("", CausalLM(), none, none, none)
