"""`edgetune export MODEL`: a model by name, a run's folder or a saved program, with example inputs, to `export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from edgetune import registry
from edgetune.other_names import nearest_file, nearest_source
from edgetune.quiet import quiet
from edgetune.sections import LANGUAGE_CHECK_ROWS
from edgetune.technique import EdgetuneError, Exit, Inputs

if TYPE_CHECKING:
    from edgetune.data.dataset import Dataset, Split
    from edgetune.export import Artifact
    from edgetune.export.carried import Carried
    from edgetune.export.dynamic import Dynamic
    from edgetune.export.language import LanguageArtifact
    from edgetune.ledger import Ledger
    from edgetune.sections import ExportSettings

CHECK_ROWS = 100
CACHE_TOKENS = 512
OWN_DATA = {"minilm": "tweets", "smollm2": "conversations", "effnet-lite0": "fashion-mnist"}
CONVERTED = ("hf", "timm", "py")  # finished as they are
ACCEPTED = "minilm, smollm2, effnet-lite0, hf:PATH, timm:NAME, py:FILE.py:FUNCTION, a run's folder, or a .pt2 file"
_WEIGHTS = "weights alone are not a model: export py:FILE.py:FUNCTION --weights FILE"
NO_MODELS = {  # by suffix, and what to do instead
    **dict.fromkeys((".pt", ".pth", ".bin", ".safetensors", ".ckpt"), _WEIGHTS),
    **dict.fromkeys(
        (".pte", ".onnx", ".tflite", ".gguf", ".h5", ".keras"), "give the model that the file was exported from"
    ),
    **dict.fromkeys((".csv", ".tsv", ".json", ".jsonl"), "give rows with --data: export MODEL --data csv:FILE"),
    **dict.fromkeys((".yaml", ".yml"), "run a recipe with: edgetune run FILE"),
}


@dataclass(frozen=True)
class Talk:
    """What makes of a language model a program that talks, instead of one for a window of tokens."""

    tokenizer: Any
    max_tokens: int = CACHE_TOKENS  # places in the cache
    prompts: tuple[tuple[int, ...], ...] = ()  # that the program and the model continue; none: the exporter's own


@dataclass(frozen=True)
class Exportable:
    """A model in eval mode, one example, rows to compare on (none: the example), and what its program carries."""

    model: nn.Module
    example: Inputs
    check_inputs: Sequence[Inputs] | None = None
    talk: Talk | None = None
    min_same_prediction_pct: float = 99.0
    carried: Carried | None = None  # None: nobody knows how its inputs are made
    ledger: Ledger | None = None  # of the run it comes from
    dynamic: Dynamic | None = None  # sizes that may differ between calls
    external_data: bool = False  # weights in a file of their own
    one_row: bool = True  # the program takes one row; else the example as it stands


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
) -> Artifact | LanguageArtifact:
    """Lower what `source` names to `path`.

    Args:
        source: a `.pt2` that `torch.export.save` wrote, the folder of a finished run, a function that builds a module
            (`py:file.py:build`), or a model of the registry (`minilm`, `hf:PATH`, `timm:NAME`).
        path: the `.pte` to write.
        device: lower for its preferred target.
        target: lower for this one instead.
        data: for a model of the registry: what gives the classes, and the rows to compare on. A model that is finished
            needs none: its classes are its own, and check inputs are made up where `inputs` gives none.
        inputs: `py:file.py:function`, which returns an input of the model, or a list of them, to compare on.
        weights: the state dict of a `py:` model, in a `.safetensors` or `.pt` file.
        language: a program that talks; what a run made such a program of becomes one anyway.
        max_tokens: places in the cache of a program that talks; by default those of the run, or 512.
        dynamic: sizes that may differ between calls, as `et.export` takes them.
        external_data: the weights into `model.ptd` beside the program.
    """
    found = with_cache(exportable(source, data, language, inputs, weights), max_tokens)
    if found.talk is not None and (dynamic or external_data):
        what = "a text-generation program takes prompts of any length and contains its weights"
        raise EdgetuneError(what, action="leave out --dynamic and --ptd, or --language")
    found = replace(found, dynamic=dynamic, external_data=external_data)
    artifact = to_program(found, path, device=device, target=target)
    if found.ledger is not None:
        tell_run(artifact, found.ledger)
    return artifact


def with_cache(found: Exportable, max_tokens: int | None) -> Exportable:
    """With so many places in its cache; raises for a model that is not to talk."""
    if max_tokens is None:
        return found
    if found.talk is None:
        raise EdgetuneError(
            "max_tokens is the cache size of a text-generation program",
            got=max_tokens,
            action="add --language, or leave it out",
        )
    return replace(found, talk=replace(found.talk, max_tokens=max_tokens))


def to_program(
    found: Exportable, path: Path, *, device: str | None = None, target: str | None = None
) -> Artifact | LanguageArtifact:
    """Lower it, prove it, and write what lies beside it: a language program where it is to talk."""
    from edgetune.export import export
    from edgetune.export.language import CHECK_PROMPT, export_language

    if found.talk is None:
        return export(
            found.model,
            found.example,
            path,
            device=device,
            target=target,
            check_inputs=found.check_inputs,
            one_row=found.one_row and not _frees_rows(found.dynamic or {}),
            min_same_prediction_pct=found.min_same_prediction_pct,
            carried=found.carried,
            dynamic=found.dynamic,
            external_data=found.external_data,
        )
    return export_language(
        found.model,
        found.talk.tokenizer,
        path,
        max_tokens=found.talk.max_tokens,
        device=device,
        target=target,
        check_prompts=found.talk.prompts or (CHECK_PROMPT,),
        min_same_prediction_pct=found.min_same_prediction_pct,
        carried=found.carried,
    )


def _frees_rows(sizes: Dynamic) -> bool:
    """Whether the first axis of an input may have several sizes."""
    return any(one.strip() == "batch" or one.strip().endswith(".0") for name in sizes for one in name.split(","))


def tell_run(artifact: Artifact | LanguageArtifact, ledger: Ledger) -> None:
    """Write the program's model card anew, with what the run measured."""
    from edgetune.export.artifact import Manifest
    from edgetune.export.card import write_card

    known = artifact.manifest
    write_card(artifact.path, known if isinstance(known, Manifest) else known.plain(), ledger)


def tokenizer_of(task: str, encode: Any) -> Any:
    """The tokenizer of a loaded language model. Raises for any other model."""
    tokenizer = getattr(encode, "tokenizer", None)
    if task != "causal-lm" or tokenizer is None:
        raise EdgetuneError(
            "a text-generation program needs a causal language model",
            got=task,
            action="use the model smollm2, or hf:PATH with texts without classes, or leave out `language`",
        )
    return tokenizer


def check_talks(model: nn.Module, task: str, encode: Any, asked: ExportSettings) -> None:
    """Raise before a training what would stop the export of a language program after it."""
    from edgetune.export.language import check_exportable

    try:
        check_exportable(model, tokenizer_of(task, encode), max_tokens=asked.max_tokens, target=asked.target)
    except EdgetuneError as error:
        error.within("export")
        raise


def of_split(
    model: nn.Module, split: Split, max_length: int, asked: ExportSettings, carried: Carried, language: bool = False
) -> Exportable:
    """A model, and of held-out rows what its program is compared on, as a recipe asks; `language`: it talks anyway."""
    kept = Exportable(model, split.one_row(0, max_length), carried=carried)
    kept = replace(kept, min_same_prediction_pct=asked.min_same_prediction_pct)
    if not (asked.language or language):
        rows = asked.rows_to_check(len(split))
        return replace(kept, check_inputs=[split.one_row(i, max_length) for i in range(rows)])
    rows = asked.rows_to_check(len(split))
    rows = rows if asked.language else min(rows, LANGUAGE_CHECK_ROWS)
    tokenizer = tokenizer_of(split.task, split.encode)
    return replace(kept, talk=Talk(tokenizer, asked.max_tokens, beginnings(split, rows)))


def beginnings(split: Split, rows: int) -> tuple[tuple[int, ...], ...]:
    """What a language program is to continue, as tokens, of each of the first `rows` rows.

    Of a text that is its first half; of a conversation, all that stands before the first answer.
    """
    from edgetune.data.dataset import IGNORED_LABEL

    prompts = []
    for index in range(rows):
        inputs, labels = split.batch([index])
        assert isinstance(inputs, dict)  # `Split` asks a language model's encoder for no less
        ids = inputs["input_ids"][0][inputs["attention_mask"][0] != 0].tolist()
        learned = labels[0].ne(IGNORED_LABEL).nonzero()
        given = int(learned[0]) if len(learned) else 0
        prompts.append(tuple(ids[: given or max(1, len(ids) // 2)]))
    return tuple(prompts)


def exportable(
    source: str,
    data: str | None = None,
    language: bool = False,
    inputs: str | None = None,
    weights: Path | None = None,
) -> Exportable:
    """The model that `source` names; see `export_from`."""
    place, kind = Path(source), source.partition(":")[0]
    if (inputs or weights) and (kind not in CONVERTED or data or language):
        what = "--inputs and --weights are for models that are exported without data"
        raise EdgetuneError(what, got=source, action="leave out --inputs and --weights, or --data and --language")
    if source.endswith(".pt2"):
        if language:
            raise EdgetuneError(
                "a program of torch.export has no tokenizer and no cache, so it cannot generate text",
                got=source,
                action="export the model itself: hf:PATH --language, or et.export_language(model, tokenizer, path)",
            )
        return _saved(place)
    if kind in CONVERTED and data is None and not language:
        from edgetune.converting import converted

        return converted(source, inputs, weights)
    if kind in registry.MODELS:
        return _by_name(source, data, language)
    if place.is_dir():
        if not (place / "recipe.yaml").is_file():
            action = "give a run's folder, or write hf:PATH for a model's folder"
            near = f"hf:{source}" if (place / "config.json").is_file() else ""
            raise EdgetuneError("this folder does not contain a run", got=source, near=near, action=action)
        from edgetune.pipeline import restore

        found = restore(place, language)
        if found.ledger is None:
            return found
        # what the run measured and predicted it says of its own program, not of the one made now
        return replace(found, ledger=found.ledger.with_(measured=(), predicted=()))
    action = NO_MODELS.get(place.suffix.lower(), "")
    near = "" if action else nearest_source(source, registry.MODELS, data=False)
    near = f"py:{source}:build" if place.suffix == ".py" and not near.startswith("py:") else near
    raise EdgetuneError(f"unknown model; accepted are {ACCEPTED}", got=source, near=near, action=action)


def _saved(path: Path) -> Exportable:
    import torch

    if not path.is_file():
        raise EdgetuneError(
            "no such file", got=str(path), near=nearest_file(path), action="write it with torch.export.save"
        )
    try:
        with quiet():
            program = torch.export.load(path)
    except Exception as error:  # a damaged archive raises almost anything
        what = f"cannot be read as a program of torch.export ({type(error).__name__}: {str(error).splitlines()[0]})"
        raise EdgetuneError(what, got=str(path), action="save it with torch.export.save") from error
    if program.example_inputs is None:
        raise EdgetuneError("the program has no example inputs", got=str(path), exit_code=Exit.EXPORT)
    args, kwargs = program.example_inputs
    if args and kwargs:
        raise EdgetuneError("inputs by position and by name cannot be combined", got=str(path), exit_code=Exit.EXPORT)
    return Exportable(_Program(program.module()).eval(), dict(kwargs) if kwargs else tuple(args), one_row=False)


def _by_name(source: str, data: str | None, language: bool) -> Exportable:
    import torch

    from edgetune.data.dataset import DataSettings, Split
    from edgetune.models.carrying import carried
    from edgetune.models.loaded import ModelSettings

    data = data or OWN_DATA.get(source.partition(":")[0])
    dataset = _texts() if data is None else registry.loader(registry.DATASETS, "data", data)(DataSettings(source=data))
    settings = ModelSettings(source=source)
    torch.manual_seed(0)
    loaded = registry.loader(registry.MODELS, "model", source)(settings, dataset)
    dataset = loaded.labelled(dataset)
    split, told = Split(dataset.task, dataset.test, loaded.encode), carried(loaded, dataset)
    by = f"{data} gave the classes and the rows to compare on, " if data else ""
    untrained = f"exported as loaded: {by}nothing was trained"
    told = told.model_copy(update={"notes": (untrained, *told.notes)})
    if language:
        tokenizer = tokenizer_of(dataset.task, loaded.encode)
        prompts = beginnings(split, min(LANGUAGE_CHECK_ROWS, len(split)))
        example = loaded.encode(["An example."])
        return Exportable(loaded.model, example, talk=Talk(tokenizer, prompts=prompts), carried=told)
    rows = [split.one_row(i, settings.max_length) for i in range(min(CHECK_ROWS, len(split)))]
    return Exportable(loaded.model, rows[0], rows, carried=told)


def _texts() -> Dataset:
    """No rows, for a language model: it has no classes to learn from them."""
    from edgetune.data.dataset import Dataset, Rows

    none = Rows([])
    return Dataset("", "causal-lm", (), none, none, none)
