"""A model with everything that its export needs, and the export of it to a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from edgetune.adapt.guarded import GuardedModel
from edgetune.adapt.low_rank import read_files
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs
from edgetune.program.card import write_card
from edgetune.recipe.sections import LANGUAGE_CHECK_ROWS
from edgetune.tasks.causal_lm import CausalLM

if TYPE_CHECKING:
    from edgetune.capture.dynamic import Dynamic
    from edgetune.core.floats import FloatType, KeyValueType
    from edgetune.core.ledger import Ledger
    from edgetune.data.dataset import Split
    from edgetune.export import Artifact
    from edgetune.program.carried import Carried
    from edgetune.program.manifest import AdapterForm
    from edgetune.recipe.sections import ExportSettings
    from edgetune.tasks.task import Task

CHECK_ROWS = 100
CACHE_TOKENS = 512


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of a text-generation program; other programs take a window of tokens."""

    tokenizer: Any
    max_tokens: int = CACHE_TOKENS  # cache positions
    cache_dtype: KeyValueType | None = None  # None: the type of the program
    prompts: tuple[tuple[int, ...], ...] = ()  # that program and model continue; empty: the exporter's own


@dataclass(frozen=True)
class Exportable:
    """A model in eval mode, one example, rows to compare on (None: the example), and its program's metadata."""

    model: nn.Module
    example: Inputs
    check_inputs: Sequence[Inputs] | None = None
    generation: GenerationSettings | None = None
    dtype: FloatType = "fp32"
    min_same_prediction_pct: float = 99.0
    carried: Carried | None = None  # None: unknown
    ledger: Ledger | None = None  # of the run it comes from
    dynamic: Dynamic | None = None  # sizes that may differ between calls
    external_data: bool = False  # weights in a separate file
    one_row: bool = True  # the program takes one row, not the whole example
    adapters: Mapping[str, Path] | None = None  # folders in peft's format, by name
    form: AdapterForm = "inputs"  # of the adapters
    adapter_rank: int | None = None  # of the LoRAs in place of other families


def set_cache(source: Exportable, max_tokens: int | None, dtype: KeyValueType | None = None) -> Exportable:
    """Set the size and the type of the cache; `None` keeps it. Raises if the program does not generate text."""
    settings = {"max_tokens": max_tokens, "cache_dtype": dtype}
    chosen: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    if not chosen:
        return source
    if source.generation is None:
        raise EdgetuneError(
            f"{next(iter(chosen))} is for the cache of a text-generation program",
            got=next(iter(chosen.values())),
            action="add --language, or leave it out",
        )
    return replace(source, generation=replace(source.generation, **chosen))


def to_program(source: Exportable, path: Path, *, device: str | None = None, target: str | None = None) -> Artifact:
    """Lower and verify the model, and write the program with its files; its card has the results of the run."""
    from edgetune.export import export
    from edgetune.export.language import CHECK_PROMPT, export_language

    if source.generation is None:
        artifact = export(
            source.model,
            source.example,
            path,
            device=device,
            target=target,
            dtype=source.dtype,
            check_inputs=source.check_inputs,
            one_row=source.one_row and not _frees_rows(source.dynamic or {}),
            min_same_prediction_pct=source.min_same_prediction_pct,
            carried=source.carried,
            dynamic=source.dynamic,
            external_data=source.external_data,
            adapters=source.adapters,
            form=source.form,
            adapter_rank=source.adapter_rank,
        )
    else:
        artifact = export_language(
            source.model,
            source.generation.tokenizer,
            path,
            max_tokens=source.generation.max_tokens,
            device=device,
            target=target,
            dtype=source.dtype,
            cache_dtype=source.generation.cache_dtype,
            check_prompts=source.generation.prompts or (CHECK_PROMPT,),
            min_same_prediction_pct=source.min_same_prediction_pct,
            carried=source.carried,
            adapters=source.adapters,
            form=source.form,
            adapter_rank=source.adapter_rank,
        )
    if source.ledger is not None:
        write_card(artifact.path, artifact.manifest, source.ledger)
    return artifact


def _frees_rows(sizes: Dynamic) -> bool:
    """Whether the first axis of an input may have several sizes."""
    return any(one.strip() == "batch" or one.strip().endswith(".0") for name in sizes for one in name.split(","))


def tokenizer_of(task: Task, encode: Any) -> Any:
    """The tokenizer of a loaded language model. Raises for any other model."""
    tokenizer = getattr(encode, "tokenizer", None)
    if task.kind != "language" or tokenizer is None:
        raise EdgetuneError(
            "a text-generation program needs a causal language model",
            got=task.name,
            action="use the model smollm2, or hf:PATH with texts without classes, or leave out `language`",
        )
    return tokenizer


def check_can_generate(model: nn.Module, task: Task, encode: Any, asked: ExportSettings) -> None:
    """Raise before a training for what would stop the export of a text-generation program after it."""
    from edgetune.export.language import check_exportable

    try:
        check_exportable(model, tokenizer_of(task, encode), max_tokens=asked.max_tokens, target=asked.target)
    except EdgetuneError as error:
        error.within("export")
        raise


def check_adapters(asked: ExportSettings) -> None:
    """Raise before a training for folders of adapters that cannot be read after it."""
    for name, folder in asked.adapters.items():
        try:
            read_files(Path(folder))
        except EdgetuneError as error:
            raise error.within(f"export.adapters, {name}") from error.__cause__


def exportable_from_split(
    model: nn.Module, split: Split, max_length: int, asked: ExportSettings, carried: Carried, language: bool = False
) -> Exportable:
    """A model, with the held-out rows that a recipe's export compares it on; `language`: generate text in any case."""
    kept = Exportable(model, split.one_row(0, max_length), carried=carried)
    kept = replace(kept, min_same_prediction_pct=asked.min_same_prediction_pct, dtype=asked.dtype)
    if asked.adapters:
        folders = {name: Path(folder) for name, folder in asked.adapters.items()}
        kept = replace(kept, adapters=folders, form=asked.form, adapter_rank=asked.adapter_rank)
    if not (asked.language or language):
        rows = asked.rows_to_check(len(split))
        return replace(kept, check_inputs=[split.one_row(i, max_length) for i in range(rows)])
    rows = asked.rows_to_check(len(split))
    rows = rows if asked.language else min(rows, LANGUAGE_CHECK_ROWS)
    tokenizer = tokenizer_of(CausalLM() if isinstance(model, GuardedModel) else split.task, split.encode)
    settings = GenerationSettings(tokenizer, asked.max_tokens, asked.cache_dtype, prompts_from_texts(split, rows))
    return replace(kept, generation=settings)


def prompts_from_texts(split: Split, rows: int) -> tuple[tuple[int, ...], ...]:
    """Prompts for a text-generation program, as tokens, from the first `rows` rows.

    The first half of a text; of a conversation, everything before the first answer.
    """
    from edgetune.data.rows import IGNORED_LABEL
    from edgetune.tasks.causal_lm import learned_tokens

    prompts = []
    for index in range(rows):
        inputs, labels = learned_tokens(split.encode_rows([index]))
        ids = inputs["input_ids"][0][inputs["attention_mask"][0] != 0].tolist()
        learned = labels[0].ne(IGNORED_LABEL).nonzero()
        given = int(learned[0]) if len(learned) else 0
        prompts.append(tuple(ids[: given or max(1, len(ids) // 2)]))
    return tuple(prompts)
