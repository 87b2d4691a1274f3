"""A callback for Lightning that finalizes the model when fitting ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgetune.core.registry import require
from edgetune.integrations.inside import announce, finalize_inside
from edgetune.train.reached import GradientWatch

if TYPE_CHECKING:
    from lightning.pytorch import Callback


def callback() -> Callback:
    """A callback for a `Trainer` whose module, or a model inside it, went through `et.apply`.

    It logs what trains, raises for parameters that no backward reaches (after ten steps or an epoch),
    and finalizes in place at the end of `Trainer.fit`, after the last checkpoint was written:
    checkpoints hold the open model, code after `fit` sees plain layers.
    """
    base: Any = require("lightning.pytorch", "the Lightning callback").Callback

    class EdgetuneLightningCallback(base):  # type: ignore[misc]
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            announce(pl_module)
            self.reached, self.steps = GradientWatch(pl_module).start(), trainer.global_step

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step > self.steps:  # batches may be accumulated
                self.steps = trainer.global_step
                self.reached.step(last=False)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.reached.judge()

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            self.reached.stop()
            finalize_inside(pl_module)

    made: Callback = EdgetuneLightningCallback()
    return made
