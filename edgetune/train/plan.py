"""The plan of a training: the number of updates, their learning rates and their rows, all fixed before the first."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from edgetune.core.inputs import Inputs

if TYPE_CHECKING:
    from edgetune.train.settings import Train


class TrainingRows(Protocol):
    """Training rows, such as `edgetune.data.dataset.Split`."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> tuple[Inputs, Tensor]:
        """Inputs, and labels for the logits: `(batch,)`, or `(batch, tokens)` with -100 where none counts."""
        ...

    @property
    def lengths(self) -> Sequence[int] | None:
        """Tokens per row, so that rows of like length can share a batch."""
        ...


class TrainingPlan:
    """What each update does, as a function of the settings, the rows and the seed alone."""

    def __init__(self, settings: Train, split: TrainingRows, seed: int) -> None:
        self.settings, self.split, self.seed = settings, split, seed
        batches = math.ceil(len(split) / settings.batch_size)
        self.updates_per_epoch = math.ceil(batches / settings.accumulate)
        if settings.updates is not None:
            self.updates = settings.updates
        else:
            self.updates = max(1, round((settings.epochs or 0) * self.updates_per_epoch))
        self.warmup = math.ceil(self.updates * settings.warmup_pct / 100)
        self._epoch, self._order = -1, [[0]]

    def factor(self, update: int) -> float:
        """The factor of the learning rate at this update, counted from 0; never 0."""
        if update < self.warmup:
            return (update + 1) / (self.warmup + 1)
        done = (update - self.warmup) / (self.updates - self.warmup)
        return {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[
            self.settings.schedule
        ]

    def rows(self, update: int) -> list[list[int]]:
        """The rows of each batch of this update."""
        epoch, place = divmod(update, self.updates_per_epoch)
        if epoch != self._epoch:
            lengths = self.split.lengths
            self._order = epoch_order(len(self.split), self.settings.batch_size, lengths, self.seed, epoch)
            self._epoch = epoch
        return self._order[place * self.settings.accumulate : (place + 1) * self.settings.accumulate]

    def ends_epoch(self, done: int) -> bool:
        """Whether an epoch, or the training, ends after this many updates."""
        return done == self.updates or done % self.updates_per_epoch == 0

    def wants_checkpoint(self, done: int) -> bool:
        """Whether a checkpoint is due after this many updates; the last update always has one."""
        return done == self.updates or done % self.settings.checkpoint_every == 0

    def batches(self, update: int) -> list[tuple[Inputs, Tensor]]:
        """The batches of this update."""
        return [self.split.batch(rows) for rows in self.rows(update)]


def epoch_order(rows: int, batch_size: int, lengths: Sequence[int] | None, seed: int, epoch: int) -> list[list[int]]:
    """Every row once, in batches of equal size (up to one row, at most `batch_size`), by `seed` and `epoch` alone.

    With `lengths`, rows are sorted by length inside pools of 50 batches, to avoid padding, and the batches are shuffled
    again.

    >>> [len(batch) for batch in epoch_order(33, 16, None, seed=0, epoch=0)]
    [11, 11, 11]
    """
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    order: list[int] = torch.randperm(rows, generator=generator).tolist()
    count = math.ceil(rows / batch_size)
    edges = [rows * n // count for n in range(count + 1)]
    if lengths is None:
        return [order[start:stop] for start, stop in itertools.pairwise(edges)]
    for pool in range(0, count, 50):
        start, stop = edges[pool], edges[min(pool + 50, count)]
        order[start:stop] = sorted(order[start:stop], key=lambda row: lengths[row])
    shuffled = torch.randperm(count, generator=generator).tolist()
    return [order[edges[n] : edges[n + 1]] for n in shuffled]
