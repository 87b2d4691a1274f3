"""`edgetune predict` and `edgetune eval`: the predictions of an exported program, and their quality."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetune.cli.devices import Json, print_result

if TYPE_CHECKING:
    from edgetune.run.given_rows import InputRow
    from edgetune.run.predicting import Answer, Evaluation

ProgramPath = Annotated[
    Path,
    typer.Argument(metavar="MODEL.PTE", help="An exported program (needs its model.json), or the folder of a run."),
]
AdapterName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="One of the program's adapters, or another file for it; default: the base."),
]
MOST_CHARACTERS = 60  # of a row in front of its answer


def predict(
    program: ProgramPath,
    rows: Annotated[
        list[str],
        typer.Argument(
            metavar="ROW...", help="Texts, images, folders of images, .txt, .csv or .jsonl files; - reads stdin."
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="Number of classes to print per row, most likely first.")] = 3,
    column: Annotated[
        list[str] | None,
        typer.Option(help="Column with the text in a .csv or .jsonl; may be repeated; default: as in the recipe."),
    ] = None,
    adapter: AdapterName = None,
    as_json: Json = False,
) -> int:
    """Predict classes, numbers or entities for rows."""
    from edgetune.cli.progress import show_progress
    from edgetune.run.given_rows import read_rows
    from edgetune.run.predicting import predict_rows
    from edgetune.run.predictor import ROWS_AT_ONCE, Predictor

    with contextlib.redirect_stdout(sys.stderr):
        predictor = Predictor(program, adapter)
        given = read_rows(rows, predictor.task.texts, sys.stdin, column or _columns(predictor.artifact.path))
        with show_progress() if len(given) > ROWS_AT_ONCE else contextlib.nullcontext(lambda *_: None) as progress:
            answers = predict_rows(predictor, [one.row for one in given], progress)
    for note in predictor.notes:
        print(f"edgetune: {note}", file=sys.stderr)
    if as_json:
        print_result([_plain(one, answer) for one, answer in zip(given, answers, strict=True)])
        return 0
    print_result("\n".join(_line(one, answer, top) for one, answer in zip(given, answers, strict=True)))
    return 0


def _columns(program: Path) -> tuple[str, ...]:
    from edgetune.core.errors import EdgetuneError
    from edgetune.run.predicting import data_settings

    try:
        return data_settings(program).text_columns
    except EdgetuneError:
        return ("text",)


def _line(given: InputRow, answer: Answer, top: int) -> str:
    text = " ".join(answer.row.split())
    text = text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"
    return f"{given.source + ': ' if given.source else ''}{text}: {_describe(answer, top)}"


def _describe(answer: Answer, top: int) -> str:
    from edgetune.core.numbers import format_number
    from edgetune.run.predicting import PredictedEntities, PredictedNumber

    if isinstance(answer, PredictedNumber):
        return format_number(answer.value)
    if isinstance(answer, PredictedEntities):
        named = (f"{one.text} ({one.kind}, {one.start}-{one.end})" for one in answer.entities)
        return ", ".join(named) or "no entities"
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in list(answer.scores.items())[:top])


def _plain(given: InputRow, answer: Answer) -> dict[str, Any]:
    from dataclasses import asdict

    return {**({"source": given.source} if given.source else {}), **asdict(answer)}


def evaluate(
    program: ProgramPath,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings of the data, such as data.label=stars.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Labelled data: csv:PATH, jsonl:PATH, imagefolder:PATH; default: the data of the run."),
    ] = None,
    split: Annotated[
        str, typer.Option(help="test: the test set, as a recipe splits the data; all: every row.")
    ] = "test",
    adapter: AdapterName = None,
    as_json: Json = False,
) -> int:
    """Score an exported program on labelled data.

    Prints the accuracy with its 95 % interval, precision and recall per class, and the confusion matrix; of a program
    without classes, the root of the mean squared error, or the F1 of entities.
    """
    from edgetune.cli.progress import show_progress
    from edgetune.core.errors import EdgetuneError
    from edgetune.recipe.overrides import parse_overrides
    from edgetune.run.predicting import evaluate as evaluate_

    if split not in ("test", "all"):
        raise EdgetuneError("unknown split", got=split, allowed=["test", "all"])
    with show_progress() as progress, contextlib.redirect_stdout(sys.stderr):
        evaluation = evaluate_(
            program, data, part="test" if split == "test" else "all", overrides=parse_overrides(overrides or []),
            adapter=adapter, progress=progress,
        )  # fmt: skip
    if as_json:
        print_result(_figures(evaluation))
    else:
        _print(evaluation)
    return 0


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    quality, answers = evaluation.quality, evaluation.answers
    by_class = {}
    if answers is not None:
        classes = [
            {**one.model_dump(), "precision_pct": one.precision_pct, "recall_pct": one.recall_pct}
            for one in answers.classes
        ]
        interval = {"interval_95_pct": quality.interval_pct}
        by_class = {**interval, **answers.model_dump(mode="json"), "classes": classes}
    return {
        "program": evaluation.program,
        "data": evaluation.data,
        "split": evaluation.part,
        "rows": quality.rows,
        quality.metric: quality.value,
        **by_class,
        "notes": evaluation.notes,
    }


def _print(evaluation: Evaluation) -> None:
    from rich.console import Console
    from rich.text import Text

    from edgetune.core.numbers import format_quality_with_interval, pluralize
    from edgetune.report.answer_tables import answer_tables
    from edgetune.report.console import clean, draw_section
    from edgetune.report.sentences import as_sentence

    console = Console()
    rows = pluralize(evaluation.quality.rows, "row")
    of = f"{rows} of the test split" if evaluation.part == "test" else f"all {rows}"
    console.print(Text(clean(f"{evaluation.program} on {evaluation.data}, {of}")))
    console.print(Text(clean(format_quality_with_interval(evaluation.quality)), style="bold"))
    for table in answer_tables(evaluation.answers) if evaluation.answers else ():
        for part in draw_section(table, console.width):
            console.print(part)
    for note in evaluation.notes:
        console.print(Text(clean(as_sentence(note)), style="dim"))
