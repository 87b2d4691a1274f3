"""Prepare a recipe up to its first training, for a training elsewhere: a training program, a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs
from edgetune.core.ledger import Quality
from edgetune.data.dataset import Split
from edgetune.recipe.recipe import Recipe
from edgetune.run.fold import Fold
from edgetune.train.plan import epoch_order
from edgetune.train.settings import Train


@dataclass(frozen=True)
class Prepared:
    """A recipe's model before its first `train` step, with its training data."""

    model: nn.Module
    settings: Train
    seed: int
    train_split: Split
    loss: Callable[[Tensor, Tensor], Tensor]
    quality: Callable[[nn.Module], Quality]  # on the test set
    pad_to: int | None  # tokens of every row, so that all batches have one shape

    def batches(self, rows: int, epoch: int = 0) -> Iterator[tuple[Inputs, Tensor]]:
        """Batches of exactly `rows` rows, shuffled by seed and epoch; remaining rows are left for another epoch."""
        for indices in epoch_order(len(self.train_split) // rows * rows, rows, None, self.seed, epoch):
            yield self.train_split.batch(indices, pad_to=self.pad_to)


def prepare(recipe: Recipe) -> Prepared:
    """Run a recipe's steps before its first `train`, without measuring. Writes nothing."""
    place = next((n for n, step in enumerate(recipe.steps) if isinstance(step.settings, Train)), None)
    if place is None:
        raise EdgetuneError("the recipe has no train step", got=recipe.name, action="add a train step")
    fold = Fold(recipe, Path(), resume=False, progress=lambda *_: None, record=False)
    fold.steps(until=place)
    settings = recipe.steps[place].settings
    assert isinstance(settings, Train)
    pad_to = fold.train_split.pad_to(recipe.model.max_length)
    loss, rows = fold.make_loss(settings.class_weights), fold.augmented_split()
    return Prepared(fold.model, settings, recipe.seed + place, rows, loss, fold.quality_of, pad_to)
