"""Predictions and quality of an exported program, by the real runtime, from the program and its metadata alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from edgetune.core import registry
from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.ledger import Answers, Quality
from edgetune.core.progress import Progress
from edgetune.data.dataset import Dataset, data_error
from edgetune.data.rows import Rows
from edgetune.data.settings import COLUMNS, DataSettings, WholeData, unread_by
from edgetune.program.adapters import Adapter
from edgetune.program.carried import ScaledValue
from edgetune.run.predictor import Predictor
from edgetune.tasks.entities import entities
from edgetune.tasks.task import Batch
from edgetune.tasks.token_classification import TokenClassification

Part = Literal["test", "all"]


@dataclass(frozen=True)
class Prediction:
    """A classifier's prediction for one row."""

    row: str  # the text, or the path of the image
    label: str
    score: float  # of that class, from 0 to 1
    scores: dict[str, float]  # of every class, the highest first; they add up to 1


@dataclass(frozen=True)
class PredictedNumber:
    """The number that a program predicts for one text."""

    row: str
    value: float


@dataclass(frozen=True)
class EntityInText:
    """An entity in a text, from character `start` up to, not including, `end`."""

    text: str
    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class PredictedEntities:
    """The entities that a program predicts in one text, in order."""

    row: str
    entities: tuple[EntityInText, ...]


Answer = Prediction | PredictedNumber | PredictedEntities


@dataclass(frozen=True)
class Evaluation:
    """A program's quality on labelled rows."""

    program: str
    data: str
    part: Part
    quality: Quality
    answers: Answers | None = None  # class by class, of a classifier
    notes: tuple[str, ...] = ()


def predict(path: str | Path, rows: str | Path | Sequence[Any], *, adapter: Adapter = None) -> tuple[Answer, ...]:
    """The predictions of the program at `path` for each row: a text, or an image as a path or a `uint8` array.

    Args:
        path: a `.pte` with its `model.json`, or the folder of a run.
        rows: one row or several; `edgetune.run.given_rows` reads them from files and folders.
        adapter: one of the program's adapters, by name; by default the base predicts alone.

    Raises `EdgetuneError`, with exit code 5 if the program lacks metadata or does not run, and 3 for a row that
    cannot be read.
    """
    return predict_rows(Predictor(path, adapter), [rows] if isinstance(rows, (str, Path)) else list(rows))


def predict_rows(predictor: Predictor, rows: Sequence[Any], progress: Progress = lambda *_: None) -> tuple[Answer, ...]:
    """The predictions of a loaded program for each row."""
    if not len(rows):
        return ()
    encoded, logits = predictor.run(rows, progress)
    postprocessing = predictor.carried.postprocessing
    if isinstance(postprocessing, ScaledValue):
        values = (logits.double().flatten() * postprocessing.std + postprocessing.mean).tolist()
        return tuple(PredictedNumber(row, value) for row, value in zip(rows, values, strict=True))
    if isinstance(predictor.task, TokenClassification):
        assert isinstance(encoded, dict)
        tags, words = logits.argmax(-1).tolist(), encoded["words"].tolist()
        return tuple(_entities(predictor, row, tags[n], words[n]) for n, row in enumerate(rows))
    shares = logits.softmax(1).tolist()
    return tuple(_prediction(row, of_row, predictor.task.labels) for row, of_row in zip(rows, shares, strict=True))


def _entities(predictor: Predictor, text: str, tags: Sequence[int], starts: Sequence[int]) -> PredictedEntities:
    words = predictor.words(text)
    assert isinstance(predictor.task, TokenClassification)
    of_words = predictor.task.tags_of_words(tags, starts, len(words))
    spans = [(kind, words[first].start(), words[end - 1].end()) for kind, first, end in entities(of_words)]
    return PredictedEntities(text, tuple(EntityInText(text[start:end], kind, start, end) for kind, start, end in spans))


def _prediction(row: Any, shares: list[float], labels: Sequence[str]) -> Prediction:
    ordered = sorted(zip(labels, shares, strict=True), key=lambda pair: -pair[1])
    name = str(row) if isinstance(row, (str, Path)) else "an array"
    return Prediction(row=name, label=ordered[0][0], score=ordered[0][1], scores=dict(ordered))


def evaluate(
    path: str | Path,
    data: str | DataSettings | None = None,
    *,
    part: Part = "test",
    overrides: Mapping[str, Any] | None = None,
    adapter: Adapter = None,
    progress: Progress = lambda *_: None,
) -> Evaluation:
    """The quality of the program at `path` on labelled data, such as accuracy, with figures per class.

    Args:
        path: a `.pte` with its `model.json`, or the folder of a run.
        data: a source as in a recipe (`csv:rows.csv`), or settings; by default the data of the run's recipe.
        part: `test` uses the rows that a recipe holds out from training, `all` uses every row.
        overrides: other settings of the data, as in a recipe: `{"data.label": "stars"}`.
        adapter: one of the program's adapters, by name; by default the base predicts alone.
        progress: called with (what, done, of, detail).

    Raises `EdgetuneError`, with exit code 3 for data of another kind or with classes that the program does not
    have.
    """
    predictor = Predictor(path, adapter)
    settings = data if isinstance(data, DataSettings) else data_settings(predictor.artifact.path, data, overrides)
    if part == "all":
        limits = dict.fromkeys(("train_rows", "validation_rows", "test_rows"))
        settings = WholeData.model_validate({**settings.model_dump(), **limits})
    dataset: Dataset = registry.loader(registry.DATASETS, "data", settings.source)(settings)
    if type(dataset.task) is not type(predictor.task):
        raise data_error(
            f"the program takes {predictor.task.rows}, and the data has {dataset.task.rows}",
            got=settings.source,
            action="give data of the kind that the program was trained on",
        )
    rows = dataset.test if part == "test" else _concatenate((dataset.train, dataset.validation, dataset.test))
    task, places = predictor.task, _match_classes(dataset.classes, predictor.task.labels)
    labelled = Rows(rows.inputs, [_renumber(label, places) for label in rows.labels or ()])
    if not len(labelled):
        raise data_error("there are no rows to measure quality on", got=dataset.name, action="give more rows")
    encoded, logits = predictor.run(rows.inputs, progress)
    indices = range(len(labelled))
    _, labels = task.collate(encoded, labelled.labels_at(indices))
    quality = task.quality([Batch(indices, encoded, logits, labels)], labelled)
    answers = task.answers(labelled, logits)
    notes = (*predictor.notes, *dataset.notes)
    return Evaluation(str(predictor.artifact.path), dataset.name, part, quality, answers, notes)


def data_settings(program: Path, source: str | None = None, overrides: Mapping[str, Any] | None = None) -> DataSettings:
    """The data of the recipe next to the program, with another source and other settings if they are given.

    Another source keeps the recipe's columns and label names, but not its numbers of rows and its test file.
    """
    from edgetune.core.places import raise_all
    from edgetune.core.validated import validate

    recipe = program.with_name("recipe.yaml")
    kept: dict[str, Any] = {}
    if recipe.is_file():
        from edgetune.recipe.recipe import load

        kept = load(recipe).data.model_dump(mode="json")
    if source is None and not kept:
        action = "pass --data, such as --data csv:rows.csv"
        raise EdgetuneError(
            "there is no recipe next to the program that names its data", where=str(program), action=action
        )
    if source is not None and source != kept.get("source"):
        columns = [name for name in COLUMNS if name in kept and name not in unread_by(source)]
        kept = {name: kept[name] for name in columns} | {"source": source}
    for key, value in (overrides or {}).items():
        name = key.removeprefix("data.")
        if name not in DataSettings.model_fields:
            raise EdgetuneError(
                "not a setting of the data", got=key, allowed=[f"data.{n}" for n in DataSettings.model_fields]
            )
        kept[name] = value
    settings, problems = validate(DataSettings, kept)
    if settings is None:
        raise_all("data", [problem.at("") for problem in problems])
    assert settings is not None  # `raise_all` has said why
    return settings


def _concatenate(parts: Sequence[Rows]) -> Rows:
    parts = [rows for rows in parts if len(rows)]
    labels = [label for rows in parts for label in rows.labels or ()]
    if len(parts) > 1 and hasattr(parts[0].inputs, "dtype"):
        import numpy as np

        return Rows(cast("Sequence[Any]", np.concatenate([np.asarray(rows.inputs) for rows in parts])), labels)
    return Rows(parts[0].inputs if len(parts) == 1 else [one for rows in parts for one in rows.inputs], labels)


def _renumber(label: Any, places: Sequence[int]) -> Any:
    if isinstance(label, tuple):
        return tuple(places[tag] for tag in label)
    return places[int(label)] if places else label


def _match_classes(classes: Sequence[str], labels: Sequence[str]) -> list[int]:
    """The program's index of each class, by name up to case and spaces; `LABEL_0` is the class `0`."""
    folded = [label.strip().casefold() for label in labels]
    if all(label == f"label_{place}" for place, label in enumerate(folded)):
        folded = [name.strip().casefold() for name in classes if name in labels] or [str(p) for p in range(len(labels))]
    places, strange = [], []
    for name in classes:
        exact = [place for place, label in enumerate(labels) if label == name]
        like = exact or [place for place, label in enumerate(folded) if label == name.strip().casefold()]
        places += like[:1]
        strange += [] if len(like) == 1 else [name]
    if strange:
        raise data_error(
            f"the data has classes that the program does not have: {truncate_list(strange)}",
            allowed=labels,
            action="rename the classes of the data to those of the program, or remove these rows",
        )
    return places
