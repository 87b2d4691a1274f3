"""Export to ExecuTorch: the only place that imports executorch and torchao's export side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from edgetune.export.artifact import Artifact, Manifest
from edgetune.technique import Inputs

__all__ = ["Artifact", "Manifest", "export"]


def export(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | Path,
    *,
    device: str | None = None,
    target: str | None = None,
    check_inputs: Sequence[Inputs] | None = None,
    min_same_prediction_pct: float = 99.0,
    max_abs_difference: float | None = None,
) -> Artifact:
    """Lower `model` to `path` (a `.pte`), prove that it computes the same, and write `model.json` beside it.

    The program takes the tensors of `example_inputs` by position, one row of each (batch 1, shapes fixed), and
    returns the logits. `device` is an id from `edgetune devices list`; its first target is taken where `target`
    is None. `check_inputs` are batches to compare on; without them the rows of the example inputs are used.
    Raises `EdgetuneError` (exit code 5) when the model cannot be lowered, the program does not load or run, fewer
    than `min_same_prediction_pct` of the rows get the same prediction, a value is not finite, or a logit differs
    by more than `max_abs_difference`. Nothing is left at `path` then that was not there before.
    """
    from edgetune.export.pipeline import Bounds, export_program

    bounds = Bounds(min_same_prediction_pct=min_same_prediction_pct, max_abs_difference=max_abs_difference)
    return export_program(
        model, example_inputs, Path(path), device=device, target=target, check_inputs=check_inputs, bounds=bounds
    )
