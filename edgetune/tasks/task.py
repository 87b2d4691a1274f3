"""What a task is: what its rows are, what is minimized, measured and compared, and what an app makes of the outputs."""

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
    """Some rows, and what a model makes of them."""

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
    """Base of all tasks. A value: two data sets of one task may have other labels.

    What is not overridden is what a task without classes does.
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
        """Values that a model gives for each row, or for each token."""
        return len(self.labels) or 1

    def with_labels(self, labels: Iterable[str]) -> Self:
        """The same task with other names."""
        return replace(self, labels=tuple(labels))

    def fit(self, train: Rows) -> Self:
        """The same task with what it learns from the training rows alone."""
        return self

    def check(self, name: str, train: Rows, held_out: Sequence[Rows]) -> None:
        """Raise for rows of the data set `name` that nothing can be learned from."""

    def collate(self, inputs: Inputs, labels: list[Any] | None) -> tuple[Inputs, Tensor]:
        """A model's inputs, and labels for its logits, of encoded rows and their labels."""
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """What training minimizes: a mean over all labels that count, a scalar; weighted by `class_weights`."""
        raise NotImplementedError

    def class_weights(self, train: Rows) -> Tensor:
        """The weight of each class in the loss, fp32 `(classes,)`, so that all count alike. Raises without classes."""
        raise EdgetuneError(f"class_weights needs classes, and {self.name} has none", action="leave it out of train")

    def quality(self, batches: Iterable[Batch], rows: Rows) -> Quality:
        """The figure that stands in the ledger, of a model's logits for all `rows`."""
        raise NotImplementedError

    def answers(self, rows: Rows, logits: Tensor) -> Answers | None:
        """Logits `(rows, ...)` counted class by class; `None` where there are no classes."""
        return None

    def baselines(self, parts: Parts, encode: Encode | None = None) -> tuple[Baseline, ...]:
        """What simple methods reach on `parts.test` after learning from `parts.train`, in the unit of `quality`."""
        raise NotImplementedError

    def postprocessing(self) -> Postprocessing | None:
        """What an app makes of a program's outputs; `None`: they are no answer to a single row."""
        return None
