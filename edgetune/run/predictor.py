"""Run an exported program on single rows, by the real runtime, with inputs made from its metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.core import registry
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.inputs import Inputs
from edgetune.core.progress import Progress
from edgetune.data.dataset import data_error
from edgetune.models.text import word_starts
from edgetune.program.adapters import Adapter
from edgetune.program.artifact import Artifact
from edgetune.program.carried import Carried, ImagePreprocessing, ScaledValue, TaggedWords
from edgetune.tasks.image_classification import ImageClassification
from edgetune.tasks.regression import Regression
from edgetune.tasks.task import Task
from edgetune.tasks.text_classification import TextClassification
from edgetune.tasks.token_classification import TokenClassification

ROWS_AT_ONCE = 256  # that are prepared and run together: 154 MiB of images of 224 pixels
OTHER_KINDS = {
    "language": "edgetune generate answers with a text-generation program; one with a guard predicts classes as well",
    "training": "edgetune train-pte trains with a training program; bring the weights back and export the model",
    "methods": "call its methods from your own code: Artifact.load(path).run(inputs, method=...)",
}


class Predictor:
    """A program that predicts single rows, with inputs made from its metadata."""

    def __init__(self, path: str | Path, adapter: Adapter = None) -> None:
        """Load the program, or that of a run's folder, with one of its adapters.

        Raises `EdgetuneError` if its metadata is incomplete, or it has no such adapter.
        """
        from edgetune.export.kit.linux.sample import Preparation

        self.artifact: Artifact = Artifact.load(path)
        self.artifact.check_runtime()
        manifest = self.artifact.manifest
        self.task: Task = _check(self.artifact)
        self.adapter = adapter
        self.given = self.artifact.with_adapter((), adapter)
        self.call, carried = manifest.answering
        assert carried is not None  # `_check` has seen it
        self.carried = carried
        described = {"calls": [self.call.model_dump(mode="json")], "carried": carried.model_dump(mode="json")}
        self.preparation = Preparation(described, self.artifact.path.parent)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for a reader of its predictions."""
        unnamed = self.task.has_classes and not self.carried.labels
        return ("the program has no class names; classes are numbered from 0",) if unnamed else ()

    def run(self, rows: Sequence[Any], progress: Progress = lambda *_: None) -> tuple[Inputs, Tensor]:
        """The encoded rows, and their logits `(rows, ...)`: of texts, words of texts, or images in files or arrays."""
        from edgetune.runtime.run import run_in_child

        encoded: list[dict[str, Tensor]] = []
        parts: list[Tensor] = []
        specs = self.artifact.manifest.own_inputs(self.call)
        with self.artifact.data_for(self.adapter) as data:
            for start in range(0, len(rows), ROWS_AT_ONCE):
                progress("rows", start, len(rows), "")
                chunk = [self._inputs(row) for row in rows[start : start + ROWS_AT_ONCE]]
                encoded += [{name: tensor for name, tensor in row.items() if name == "words"} for row in chunk]
                batches = self._batches([tuple(row[spec.name] for spec in specs) for row in chunk])
                given = [(*row, *self.given) for row in batches]
                outputs = run_in_child(self.artifact.path, given, method=self.call.name, data=data)
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
        return {name: torch.cat([row[name] for row in encoded]) for name in encoded[0]}, logits

    def words(self, text: str) -> list[re.Match[str]]:
        """The words of a text, as the program's metadata splits it."""
        postprocessing = self.carried.postprocessing
        assert isinstance(postprocessing, TaggedWords)
        words = [*re.finditer(postprocessing.words, text)]
        if not words:
            raise data_error("the text has no words", got=text, action="give a text with words")
        return words

    def _inputs(self, row: Any) -> dict[str, Tensor]:
        """The tensors of one row by name; for words, also the word that each token begins."""
        if not self.task.texts:
            return _image_inputs(self.preparation, row)
        if not isinstance(self.task, TokenClassification):
            tensors: dict[str, Tensor] = self.preparation.inputs(str(row))
            return tensors
        words = list(row) if isinstance(row, tuple) else [match.group() for match in self.words(row)]
        assert self.preparation.tokenizer is not None  # its inputs are texts
        encoding = self.preparation.tokenizer.encode(words, is_pretokenized=True)
        tensors = self.preparation.pad(encoding.ids)
        starts = word_starts(encoding.word_ids)
        return {**tensors, "words": torch.tensor([starts + [-1] * (tensors["input_ids"].shape[1] - len(starts))])}

    def _batches(self, rows: list[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
        """The rows in batches of the program's size, the last one filled up with its last row."""
        spec = self.call.inputs[0]
        size = (spec.smallest or spec.shape)[0]
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            batch = batch + [batch[-1]] * (size - len(batch))
            yield tuple(torch.cat(tensors) for tensors in zip(*batch, strict=True))


def _image_inputs(preparation: Any, row: Any) -> dict[str, Tensor]:
    image = registry.require("PIL.Image", "an image")
    try:
        if not isinstance(row, (str, Path)):
            return dict(preparation.image(image.fromarray(row)))
        return dict(preparation.inputs(str(row)))
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, image.DecompressionBombError) as error:
        missing = isinstance(error, FileNotFoundError)
        message = "no such image" if missing else f"the image cannot be read ({error or type(error).__name__})"
        raise data_error(message, got=str(row), action="give the path of an image, or of a folder of images") from error


def _check(artifact: Artifact) -> Task:
    """The task of a program. Raises `EdgetuneError` if its metadata does not allow predictions."""
    from edgetune.export.targets import find

    manifest, (call, carried) = artifact.manifest, artifact.manifest.answering
    if manifest.kind in OTHER_KINDS and manifest.guard is None:
        raise EdgetuneError(
            "the program does not answer for single rows",
            got=manifest.kind,
            where=str(artifact.path),
            action=OTHER_KINDS[manifest.kind],
            exit_code=Exit.EXPORT,
        )
    lacking = []
    if carried is None or carried.preprocessing is None:
        lacking.append("how its inputs are made from a text or an image")
    if carried is None or carried.postprocessing is None:
        lacking.append("what its output means, such as one of several classes")
    if lacking or carried is None or carried.preprocessing is None:
        raise EdgetuneError(
            f"the program does not say {' nor '.join(lacking)}",
            where=str(artifact.path),
            action="export a model by name (hf:PATH, timm:NAME), or a run: their programs contain it",
            exit_code=Exit.EXPORT,
        )
    is_image = isinstance(carried.preprocessing, ImagePreprocessing)
    names = [spec.name for spec in manifest.own_inputs(call)]
    shape = call.outputs[0].shape
    task, dimensions = _task_of(carried, shape)
    fits = len(names) == 1 if is_image else sorted(names) == ["attention_mask", "input_ids"]
    if not fits or len(shape) != dimensions or task.outputs != shape[-1]:
        raise EdgetuneError(
            "the inputs or outputs of the program do not match its metadata",
            where=str(artifact.path),
            got=[str(spec) for spec in (*call.inputs, *call.outputs)],
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
    return task


def _task_of(carried: Carried, shape: Sequence[int]) -> tuple[Task, int]:
    """The task that a program was made for, and the number of dimensions of its output."""
    postprocessing, labels = carried.postprocessing, carried.labels or tuple(map(str, range(shape[-1])))
    if isinstance(postprocessing, ScaledValue):
        return Regression(mean=postprocessing.mean, std=postprocessing.std), 2
    if isinstance(postprocessing, TaggedWords):
        return TokenClassification(labels), 3
    is_image = isinstance(carried.preprocessing, ImagePreprocessing)
    return ImageClassification(labels) if is_image else TextClassification(labels), 2
