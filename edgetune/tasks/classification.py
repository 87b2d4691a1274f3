"""Rows with one of several classes: what text and image classification share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.inputs import Inputs
from edgetune.core.ledger import Answers, Quality
from edgetune.data.rows import IGNORED_LABEL, Rows
from edgetune.lean.head import cross_entropy
from edgetune.program.carried import ClassScores
from edgetune.tasks.answers import count_answers
from edgetune.tasks.task import Batch, Task


@dataclass(frozen=True)
class Classification(Task):
    """Cross entropy and accuracy of logits `(batch, classes)` with labels `(batch,)`, int64."""

    has_classes: ClassVar[bool] = True

    def check(self, name: str, train: Rows, held_out: Sequence[Rows]) -> None:
        """Raise unless there are two classes, each with training rows."""
        if len(self.labels) < 2:
            raise EdgetuneError(
                f"{name}: at least two classes are needed",
                got=", ".join(self.labels) or "none",
                action="add rows of a second class, or give the column or folder that holds the classes",
                exit_code=Exit.DATA,
            )
        seen = set(train.labels or ())
        empty = [label for n, label in enumerate(self.labels) if n not in seen]
        if not empty:
            return
        elsewhere = {n for rows in held_out for n in rows.labels or ()}
        only_held_out = any(self.labels.index(label) in elsewhere for label in empty)
        kind = "classes that only occur in the held-out rows" if only_held_out else "classes without a row"
        raise EdgetuneError(
            f"{name}: {kind}: {', '.join(empty)}",
            action="add training rows of every class, remove the class, or raise data.train_rows",
            exit_code=Exit.DATA,
        )

    def collate(self, inputs: Inputs, labels: list[Any] | None) -> tuple[Inputs, Tensor]:
        """The classes as int64 `(batch,)`."""
        if labels is None:
            raise EdgetuneError("these rows have no labels", got=self.name, exit_code=Exit.DATA)
        return inputs, torch.tensor(labels, dtype=torch.int64)

    def loss(self, logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """Mean cross entropy; with `class_weights`, `(classes,)`, the weighted mean."""
        if class_weights is not None:
            return functional.cross_entropy(logits, labels, class_weights.to(logits), ignore_index=IGNORED_LABEL)
        return cross_entropy(logits, labels, ignore_index=IGNORED_LABEL)

    def class_weights(self, train: Rows) -> Tensor:
        """Inverse to the share of the class among the training rows, with mean 1 per row.

        King and Zeng, Logistic Regression in Rare Events Data, 2001, section 4.1: rows / (classes * rows of the class).
        """
        counts = torch.bincount(torch.tensor(train.labels), minlength=len(self.labels)).float()
        return len(train) / (len(self.labels) * counts)

    def quality(self, batches: Iterable[Batch], rows: Rows) -> Quality:
        """Accuracy in per cent."""
        right = sum(int((batch.logits.argmax(1) == batch.labels).sum()) for batch in batches)
        return Quality(metric="accuracy_pct", value=100 * right / len(rows), rows=len(rows))

    def answers(self, rows: Rows, logits: Tensor) -> Answers:
        """Figures per class, confusions and mistakes."""
        return count_answers(self.labels, rows, logits, images=not self.texts)

    def postprocessing(self) -> ClassScores:
        """The class with the highest score."""
        return ClassScores()
