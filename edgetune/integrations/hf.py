"""A callback for `transformers.Trainer` that finalizes the model when training ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgetune.core.registry import require
from edgetune.integrations.inside import announce, finalize_inside
from edgetune.train.reached import GradientWatch

if TYPE_CHECKING:
    from transformers import TrainerCallback


def callback() -> TrainerCallback:
    """A callback for a `Trainer` whose model went through `et.apply`.

    It logs what trains, raises for parameters that no backward reaches (after ten steps or an epoch),
    and finalizes the model in place at the end of `Trainer.train`, after the best checkpoint
    was loaded: `Trainer.save_model` and `Trainer.evaluate` then see plain layers. Intermediate checkpoints hold the
    open model, so that `resume_from_checkpoint` works on a model that went through the same `et.apply`.
    """
    base: Any = require("transformers", "the Trainer callback").TrainerCallback

    class EdgetuneTrainerCallback(base):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            announce(kwargs["model"])
            self.reached = GradientWatch(kwargs["model"]).start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.reached.step(last=state.global_step == state.max_steps)

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.reached.judge()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.reached.stop()
            finalize_inside(kwargs["model"])

    made: TrainerCallback = EdgetuneTrainerCallback()
    return made
