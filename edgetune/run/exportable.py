"""A model with what its program is made of, compared on and bundled with, and the program made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs
from edgetune.recipe.sections import LANGUAGE_CHECK_ROWS

if TYPE_CHECKING:
    from edgetune.capture.dynamic import Dynamic
    from edgetune.core.ledger import Ledger
    from edgetune.data.dataset import Split
    from edgetune.export import Artifact
    from edgetune.program.carried import Carried
    from edgetune.recipe.sections import ExportSettings
    from edgetune.tasks.task import Task

CHECK_ROWS = 100
CACHE_TOKENS = 512


@dataclass(frozen=True)
class GenerationSettings:
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
    generation: GenerationSettings | None = None
    min_same_prediction_pct: float = 99.0
    carried: Carried | None = None  # None: nobody knows how its inputs are made
    ledger: Ledger | None = None  # of the run it comes from
    dynamic: Dynamic | None = None  # sizes that may differ between calls
    external_data: bool = False  # weights in a file of their own
    one_row: bool = True  # the program takes one row; else the example as it stands


def set_cache_size(source: Exportable, max_tokens: int | None) -> Exportable:
    """With so many places in its cache; raises for a model that is not to talk."""
    if max_tokens is None:
        return source
    if source.generation is None:
        raise EdgetuneError(
            "max_tokens is the cache size of a text-generation program",
            got=max_tokens,
            action="add --language, or leave it out",
        )
    return replace(source, generation=replace(source.generation, max_tokens=max_tokens))


def to_program(source: Exportable, path: Path, *, device: str | None = None, target: str | None = None) -> Artifact:
    """Lower it, prove it, and write what lies beside it: a language program where it is to talk."""
    from edgetune.export import export
    from edgetune.export.language import CHECK_PROMPT, export_language

    if source.generation is None:
        return export(
            source.model,
            source.example,
            path,
            device=device,
            target=target,
            check_inputs=source.check_inputs,
            one_row=source.one_row and not _frees_rows(source.dynamic or {}),
            min_same_prediction_pct=source.min_same_prediction_pct,
            carried=source.carried,
            dynamic=source.dynamic,
            external_data=source.external_data,
        )
    return export_language(
        source.model,
        source.generation.tokenizer,
        path,
        max_tokens=source.generation.max_tokens,
        device=device,
        target=target,
        check_prompts=source.generation.prompts or (CHECK_PROMPT,),
        min_same_prediction_pct=source.min_same_prediction_pct,
        carried=source.carried,
    )


def _frees_rows(sizes: Dynamic) -> bool:
    """Whether the first axis of an input may have several sizes."""
    return any(one.strip() == "batch" or one.strip().endswith(".0") for name in sizes for one in name.split(","))


def write_card_with_run(artifact: Artifact, ledger: Ledger) -> None:
    """Write the program's model card anew, with what the run measured."""
    from edgetune.program.card import write_card

    write_card(artifact.path, artifact.manifest, ledger)


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
    """Raise before a training what would stop the export of a language program after it."""
    from edgetune.export.language import check_exportable

    try:
        check_exportable(model, tokenizer_of(task, encode), max_tokens=asked.max_tokens, target=asked.target)
    except EdgetuneError as error:
        error.within("export")
        raise


def exportable_from_split(
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
    return replace(kept, generation=GenerationSettings(tokenizer, asked.max_tokens, prompts_from_texts(split, rows)))


def prompts_from_texts(split: Split, rows: int) -> tuple[tuple[int, ...], ...]:
    """What a language program is to continue, as tokens, of each of the first `rows` rows.

    Of a text that is its first half; of a conversation, all that stands before the first answer.
    """
    from edgetune.data.rows import IGNORED_LABEL
    from edgetune.tasks.causal_lm import learned_tokens

    prompts = []
    for index in range(rows):
        inputs, labels = learned_tokens(split.encoded([index]))
        ids = inputs["input_ids"][0][inputs["attention_mask"][0] != 0].tolist()
        learned = labels[0].ne(IGNORED_LABEL).nonzero()
        given = int(learned[0]) if len(learned) else 0
        prompts.append(tuple(ids[: given or max(1, len(ids) // 2)]))
    return tuple(prompts)
