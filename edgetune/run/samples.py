"""Rows of a run's data for measures, techniques and the export, in the shapes that they need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from edgetune.core.inputs import Inputs
from edgetune.core.technique import Sample
from edgetune.data.dataset import Dataset, Split

CALIBRATION_ROWS = 16  # of the training set, in each of the batches a technique may look at
CALIBRATION_BATCHES = 8
_FEW_ROWS = 20


@dataclass(frozen=True)
class Samples:
    """Rows of the training set for techniques and for memory; of the test set for the program's shape."""

    train: Split
    test: Split
    max_length: int
    batch_size: int  # of the first training

    def example(self) -> Inputs:
        """The first row of the test set, in the program's shape."""
        return self.test.one_row(0, self.max_length)

    def largest_batch(self, rows: int) -> tuple[Inputs, Tensor]:
        """The training rows with the most tokens, which need the most memory."""
        lengths = self.train.lengths or (0,) * len(self.train)
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        return self.train.batch(order[:rows])

    def least_batch(self, batch_sizes: Sequence[int]) -> int | None:
        """Rows of the smallest batch with these batch sizes; `None` if nothing is trained.

        An epoch is cut into batches of equal size, up to one row.
        """
        rows = len(self.train)
        return min((rows // math.ceil(rows / size) for size in batch_sizes), default=None)

    def sample(
        self, loss: Callable[[Tensor, Tensor], Tensor], calibration_batches: int = CALIBRATION_BATCHES
    ) -> Sample:
        """The data that techniques may use: training rows only."""
        pad_to = self.train.pad_to(self.max_length)

        def batches() -> Iterator[Inputs]:
            rows = min(CALIBRATION_ROWS * calibration_batches, len(self.train))
            for start in range(0, rows, CALIBRATION_ROWS):
                chosen = range(start, min(start + CALIBRATION_ROWS, rows))
                yield self.train.batch(chosen, pad_to=pad_to)[0]

        def labelled() -> Iterator[tuple[Inputs, Tensor]]:
            yield self.largest_batch(self.batch_size)
            rows = min(self.batch_size * CALIBRATION_BATCHES, len(self.train))
            for start in range(0, rows, self.batch_size):
                yield self.train.batch(range(start, min(start + self.batch_size, rows)))

        return Sample(self.train.one_row(0, self.max_length), batches, labelled, loss)


def few_rows_note(dataset: Dataset) -> tuple[str, ...]:
    """A note where a quality would be measured on few rows."""
    rows = len(dataset.test)
    return (f"only {rows} row{'s' * (rows != 1)} to test on: give more, or data.test_file",) if rows < _FEW_ROWS else ()
