"""Answers of an exported classifier, by the real runtime, from nothing but the program and what it carries."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from edgetune.core import registry
from edgetune.core.errors import EdgetuneError, Exit, shortened
from edgetune.core.ledger import Answers, Quality
from edgetune.core.progress import Progress
from edgetune.data.dataset import Dataset, data_error
from edgetune.data.rows import Rows
from edgetune.data.settings import COLUMNS, DataSettings, WholeData, unread_by
from edgetune.tasks.classification import Classification
from edgetune.tasks.image_classification import ImageClassification
from edgetune.tasks.text_classification import TextClassification

if TYPE_CHECKING:
    from edgetune.program.artifact import Artifact

Part = Literal["test", "all"]

ROWS_AT_ONCE = 256  # that are prepared and run together: 154 MiB of images of 224 pixels
OTHER_KINDS = {
    "language": "edgetune generate answers with a text-generation program",
    "training": "edgetune train-pte trains with a training program; bring the weights back and export the model",
    "methods": "call its methods from your own code: edgetune.export.methods_artifact",
}


@dataclass(frozen=True)
class Prediction:
    """What a program answers for one row."""

    row: str  # the text, or the path of the image
    label: str
    score: float  # of that class, from 0 to 1
    scores: dict[str, float]  # of every class, the highest first; they add up to 1


@dataclass(frozen=True)
class Evaluation:
    """How a program does on labelled rows."""

    program: str
    data: str
    part: Part
    answers: Answers
    notes: tuple[str, ...] = ()

    @property
    def quality(self) -> Quality:
        """Its accuracy."""
        return self.answers.quality


class Classifier:
    """A program that chooses one of several classes, with what it carries to make its inputs."""

    def __init__(self, path: str | Path) -> None:
        """Read the program, or that of a run's folder. Raises `EdgetuneError` that names what it lacks."""
        from edgetune.export.kit.linux.sample import Preparation
        from edgetune.program.artifact import Artifact, program_at

        place = program_at(Path(path))
        _check_kind(place)
        self.artifact: Artifact = Artifact.load(place)
        self.task: Classification = _check(self.artifact)
        self.preparation = Preparation(self.artifact.manifest.model_dump(mode="json"), place.parent)
        carried = self.artifact.manifest.carried
        assert carried is not None  # `_check` has seen it
        self.carried = carried

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of its answers has to know."""
        return () if self.carried.labels else ("the program has no class names; classes are numbered from 0",)

    def logits(self, rows: Sequence[Any], progress: Progress = lambda *_: None) -> Tensor:
        """Logits `(rows, classes)` of texts, or of images in files or arrays of bytes."""
        from edgetune.runtime.run import run_in_child

        parts: list[Tensor] = []
        for start in range(0, len(rows), ROWS_AT_ONCE):
            progress("rows", start, len(rows), "")
            chunk = rows[start : start + ROWS_AT_ONCE]
            batches = [*self._batches([self._inputs(row) for row in chunk])]
            outputs = run_in_child(self.artifact.path, batches, data=self.artifact.data_path)
            parts.append(torch.cat([output[0] for output in outputs])[: len(chunk)])
        progress("rows", len(rows), len(rows), "")
        logits = torch.cat(parts).float()
        if not bool(torch.isfinite(logits).all()):
            raise EdgetuneError(
                "the outputs of the program are not finite",
                where=str(self.artifact.path),
                action="check the run that made it for a high learning rate or an overflowing quantization",
                exit_code=Exit.EXPORT,
            )
        return logits

    def _inputs(self, row: Any) -> tuple[Tensor, ...]:
        """The tensors of one row, in the order that the program takes them."""
        tensors = self.preparation.inputs(str(row)) if self.task.texts else _picture(self.preparation, row)
        return tuple(tensors[spec.name] for spec in self.artifact.manifest.inputs)

    def _batches(self, rows: list[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
        """The rows in batches of the size that the program takes, the last one filled up with its last row."""
        spec = self.artifact.manifest.inputs[0]
        size = (spec.smallest or spec.shape)[0]
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            batch = batch + [batch[-1]] * (size - len(batch))
            yield tuple(torch.cat(tensors) for tensors in zip(*batch, strict=True))


def predict(path: str | Path, rows: str | Path | Sequence[Any]) -> tuple[Prediction, ...]:
    """The predictions of the program at `path` for each row: a text, or an image as a path or a `uint8` array.

    Args:
        path: a `.pte` with its `model.json`, or the folder of a run.
        rows: one row or several; `edgetune.run.given_rows` reads them from files and folders.

    Raises `EdgetuneError`, with exit code 5 if the program lacks metadata or does not run, and 3 for a row that
    cannot be read.
    """
    return answers_for(Classifier(path), [rows] if isinstance(rows, (str, Path)) else list(rows))


def answers_for(
    classifier: Classifier, rows: Sequence[Any], progress: Progress = lambda *_: None
) -> tuple[Prediction, ...]:
    """What a program that is loaded already answers for each row."""
    if not len(rows):
        return ()
    return tuple(
        _prediction(row, shares, classifier.task.labels)
        for row, shares in zip(rows, classifier.logits(rows, progress).softmax(1).tolist(), strict=True)
    )


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
    progress: Progress = lambda *_: None,
) -> Evaluation:
    """Accuracy of the program at `path` on labelled data, with figures per class.

    Args:
        path: a `.pte` with its `model.json`, or the folder of a run.
        data: a source as in a recipe (`csv:rows.csv`), or settings; by default the data of the run's recipe.
        part: `test` uses the rows that a recipe holds out from training, `all` uses every row.
        overrides: other settings of the data, as in a recipe: `{"data.label": "stars"}`.
        progress: called with (what, done, of, detail).

    Raises `EdgetuneError`, with exit code 3 for data of another kind or with classes that the program does not
    have.
    """
    classifier = Classifier(path)
    settings = data if isinstance(data, DataSettings) else data_settings(classifier.artifact.path, data, overrides)
    if part == "all":
        limits = dict.fromkeys(("train_rows", "validation_rows", "test_rows"))
        settings = WholeData.model_validate({**settings.model_dump(), **limits})
    dataset: Dataset = registry.loader(registry.DATASETS, "data", settings.source)(settings)
    if type(dataset.task) is not type(classifier.task):
        raise data_error(
            f"the program takes {classifier.task.rows}, and the data has {dataset.task.rows}",
            got=settings.source,
            action="give data of the kind that the program was trained on",
        )
    rows = dataset.test if part == "test" else _together((dataset.train, dataset.validation, dataset.test))
    places = _places(dataset.classes, classifier.task.labels)
    labelled = Rows(rows.inputs, [places[int(label)] for label in rows.labels or ()])
    answers = classifier.task.answers(labelled, classifier.logits(rows.inputs, progress))
    notes = (*classifier.notes, *dataset.notes)
    return Evaluation(str(classifier.artifact.path), dataset.name, part, answers, notes)


def data_settings(program: Path, source: str | None = None, overrides: Mapping[str, Any] | None = None) -> DataSettings:
    """The data of the recipe beside the program, with another source and other settings where they are given.

    A recipe's columns and names of labels are kept for another source, its numbers of rows and its test file are not.
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


def _together(parts: Sequence[Rows]) -> Rows:
    """All rows of a data set, one part after the other."""
    parts = [rows for rows in parts if len(rows)]
    labels = [label for rows in parts for label in rows.labels or ()]
    if len(parts) > 1 and hasattr(parts[0].inputs, "dtype"):
        import numpy as np

        return Rows(cast("Sequence[Any]", np.concatenate([np.asarray(rows.inputs) for rows in parts])), labels)
    return Rows(parts[0].inputs if len(parts) == 1 else [one for rows in parts for one in rows.inputs], labels)


def _places(classes: Sequence[str], labels: Sequence[str]) -> list[int]:
    """Where each class of the data stands among the program's: by name, but for case and spaces around.

    Outputs called `LABEL_0`, `LABEL_1` are the classes `0`, `1`.
    """
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
            f"the data has classes that the program does not have: {shortened(strange)}",
            allowed=labels,
            action="rename the classes of the data to those of the program, or remove these rows",
        )
    return places


def _picture(preparation: Any, row: Any) -> dict[str, Tensor]:
    """The tensors of an image in a file or in an array of bytes."""
    image = registry.require("PIL.Image", "an image")
    try:
        if not isinstance(row, (str, Path)):
            return dict(preparation.picture(image.fromarray(row)))
        return dict(preparation.inputs(str(row)))
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, image.DecompressionBombError) as error:
        missing = isinstance(error, FileNotFoundError)
        what = "no such image" if missing else f"the image cannot be read ({error or type(error).__name__})"
        raise data_error(what, got=str(row), action="give the path of an image, or of a folder of images") from error


def _check_kind(path: Path) -> None:
    """Raise for a program that answers in another way, with the verb for it."""
    from edgetune.program.artifact import manifest_path

    try:
        manifest = json.loads(manifest_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # said by whoever reads it whole
    action = OTHER_KINDS.get(manifest.get("kind", "model")) if isinstance(manifest, dict) else None
    if action is not None:
        raise EdgetuneError(
            "the program does not predict a class",
            got=manifest["kind"],
            where=str(path),
            action=action,
            exit_code=Exit.EXPORT,
        )


def _check(artifact: Artifact) -> Classification:
    """The task of a classifier. Raises `EdgetuneError` that names what the program lacks for an answer."""
    from edgetune.export.targets import find
    from edgetune.program.carried import ImagePreprocessing

    manifest, carried = artifact.manifest, artifact.manifest.carried
    lacking = []
    if carried is None or carried.preprocessing is None:
        lacking.append("how its inputs are made from a text or an image")
    if carried is None or carried.postprocessing is None:
        lacking.append("that its output is one of several classes")
    if lacking or carried is None or carried.preprocessing is None:
        raise EdgetuneError(
            f"the program does not say {' nor '.join(lacking)}",
            where=str(artifact.path),
            action="export a classifier by name (hf:PATH, timm:NAME), or a run: their programs contain it",
            exit_code=Exit.EXPORT,
        )
    pictures = isinstance(carried.preprocessing, ImagePreprocessing)
    names = [spec.name for spec in manifest.inputs]
    outputs = math.prod(manifest.outputs[0].shape[1:])
    if (len(names) != 1 if pictures else sorted(names) != ["attention_mask", "input_ids"]) or (
        len(manifest.outputs[0].shape) != 2 or len(carried.labels) not in (0, outputs)
    ):
        raise EdgetuneError(
            "the inputs or outputs of the program do not match its metadata",
            where=str(artifact.path),
            got=[str(spec) for spec in (*manifest.inputs, *manifest.outputs)],
            action="export with inputs as carried.preprocessing makes them, and a name for each class",
            exit_code=Exit.EXPORT,
        )
    if not find(manifest.target).runs_here:
        raise EdgetuneError(
            f"a program for {manifest.target} does not run on this machine",
            where=str(artifact.path),
            action="export the same model with --target xnnpack, and use that program",
            exit_code=Exit.EXPORT,
        )
    labels = carried.labels or tuple(str(place) for place in range(outputs))
    return ImageClassification(labels) if pictures else TextClassification(labels)
