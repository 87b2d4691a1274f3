"""The base of tasks: rows, loss, quality, baselines, and how an app interprets the outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor
from typing_extensions import Self

from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs
from edgetune.core.ledger import Answers, Baseline, Quality
from edgetune.data.rows import Encode, Rows
from edgetune.program.carried import Postprocessing


class Batch(NamedTuple):
    """Some rows, and a model's outputs for them."""

    indices: Sequence[int]  # of the rows
    inputs: Inputs  # as the encoder made them
    logits: Tensor
    labels: Tensor


class Parts(NamedTuple):
    """The rows of a data set."""

    train: Rows
    validation: Rows
    test: Rows


@dataclass(frozen=True)
class Task:
    """Base of all tasks. A value: two data sets of one task may have different labels.

    The defaults are those of a task without classes.
    """

    labels: tuple[str, ...] = ()  # names of what the model chooses from, in the order of its outputs

    name: ClassVar[str]
    kind: ClassVar[Literal["text", "image", "language"]] = "text"  # of the steps that suit it
    rows: ClassVar[str]  # "texts with classes"
    models: ClassVar[str] = "minilm or hf:PATH"  # that can do it
    texts: ClassVar[bool] = True  # whether rows are padded to a length
    has_classes: ClassVar[bool] = False  # whether each row has one, to be counted by

    @property
    def outputs(self) -> int:
        """Number of values that a model returns for each row, or for each token."""
        return len(self.labels) or 1

    def with_labels(self, labels: Iterable[str]) -> Self:
        """The same task with other label names."""
        return replace(self, labels=tuple(labels))

    def fit(self, train: Rows) -> Self:
        """The same task with what it learns from the training rows."""
        return self

    def check(self, name: str, train: Rows, held_out: Sequence[Rows]) -> None:
        """Raise if nothing can be learned from the rows of the data set `name`."""

    def collate(self, inputs: Inputs, labels: list[Any] | None) -> tuple[Inputs, Tensor]:
        """A model's inputs, and labels for its logits, from encoded rows and their labels."""
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """The loss to minimize: a scalar mean over all labels that count, weighted by `class_weights`."""
        raise NotImplementedError

    def class_weights(self, train: Rows) -> Tensor:
        """Weights of the classes in the loss, fp32 `(classes,)`, so that all count equally; raises without classes."""
        raise EdgetuneError(f"class_weights needs classes, and {self.name} has none", action="leave it out of train")

    def quality(self, batches: Iterable[Batch], rows: Rows) -> Quality:
        """The quality that the ledger records, from a model's logits for all `rows`."""
        raise NotImplementedError

    def answers(self, rows: Rows, logits: Tensor) -> Answers | None:
        """Logits `(rows, ...)` counted by class; `None` for a task without classes."""
        return None

    def baselines(self, parts: Parts, encode: Encode | None = None) -> tuple[Baseline, ...]:
        """The quality of simple methods on `parts.test` after learning from `parts.train`."""
        raise NotImplementedError

    def postprocessing(self) -> Postprocessing | None:
        """How an app interprets a program's outputs; `None` if they are not an answer to a single row."""
        return None
