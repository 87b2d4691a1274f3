"""Regression: texts with one number each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.inputs import Inputs
from edgetune.core.ledger import Baseline, Quality
from edgetune.data.rows import Encode, Rows
from edgetune.program.carried import ScaledValue
from edgetune.tasks.baselines import mean_baseline, tfidf_ridge
from edgetune.tasks.task import Batch, Parts, Task


@dataclass(frozen=True)
class Regression(Task):
    """Mean squared error of outputs `(batch, 1)` with labels `(batch,)`, both standardized; the quality is not."""

    mean: float = 0.0  # of the training values
    std: float = 1.0

    name: ClassVar[str] = "regression"
    rows: ClassVar[str] = "texts with numbers"

    def fit(self, train: Rows) -> Regression:
        """With mean and standard deviation of the training values."""
        if not len(train):
            return self
        values = torch.tensor(train.labels, dtype=torch.float64)
        return replace(self, mean=values.mean().item(), std=values.std(correction=0).item() or 1.0)

    def check(self, name: str, train: Rows, held_out: Sequence[Rows]) -> None:
        """Raise if all values are the same."""
        if len(set(train.labels or ())) < 2:
            raise EdgetuneError(
                f"{name}: every training row has the same number",
                got=next(iter(train.labels or ()), None),
                action="set data.target to a column whose numbers differ",
                exit_code=Exit.DATA,
            )

    def collate(self, inputs: Inputs, labels: list[Any] | None) -> tuple[Inputs, Tensor]:
        """The standardized values, fp32 `(batch,)`."""
        if labels is None:
            raise EdgetuneError("these rows have no numbers", got=self.name, exit_code=Exit.DATA)
        return inputs, ((torch.tensor(labels, dtype=torch.float64) - self.mean) / self.std).float()

    def loss(self, logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """Mean squared error of standardized values."""
        return functional.mse_loss(logits.float().reshape(labels.shape), labels)

    def quality(self, batches: Iterable[Batch], rows: Rows) -> Quality:
        """The root mean squared error, in the unit of the data."""
        squares = sum(
            (batch.logits.double().flatten() - batch.labels.double()).square().sum().item() for batch in batches
        )
        return Quality(metric="rmse", value=self.std * math.sqrt(squares / len(rows)), rows=len(rows))

    def baselines(self, parts: Parts, encode: Encode | None = None) -> tuple[Baseline, ...]:
        """Always the mean of the training values; TF-IDF with ridge regression."""
        return mean_baseline(parts), tfidf_ridge(parts)

    def postprocessing(self) -> ScaledValue:
        """The output, scaled back to the unit of the data."""
        return ScaledValue(mean=self.mean, std=self.std)
