"""Export to ExecuTorch: the only place that imports executorch and torchao's export side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from edgetune.export.artifact import Artifact, Manifest
from edgetune.export.carried import Carried
from edgetune.export.dynamic import Dynamic
from edgetune.technique import Inputs

__all__ = ["Artifact", "Carried", "Manifest", "export"]


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
    carried: Carried | None = None,
    dynamic: Dynamic | None = None,
    external_data: bool = False,
    io_in_plan: bool = True,
) -> Artifact:
    """Lower `model` to `path` (a `.pte`), prove that it computes the same, and write `model.json` beside it.

    The program takes the tensors of `example_inputs` by position, one row of each (batch 1, shapes fixed), and
    returns the logits. `device` is an id from `edgetune devices list`; its first target is taken where `target`
    is None. `check_inputs` are batches to compare on; without them the rows of the example inputs are used.
    Raises `EdgetuneError` (exit code 5) when the model cannot be lowered, the program does not load or run, fewer
    than `min_same_prediction_pct` of the rows get the same prediction, a value is not finite, or a logit differs
    by more than `max_abs_difference`. Nothing is left at `path` then that was not there before.

    `carried` is what an app needs beside the program: it goes into `model.json`, its tokenizer to
    `model.tokenizer.json`, and a model card to `model.md`.

    `dynamic` lets sizes differ between calls: `{"tokens": (1, 64), "batch": (1, 8)}`, or any axis by its name, as in
    `{"pixels.2": (64, 256)}` (see `edgetune.export.dynamic`). The program is compared at the bounds and between them,
    and its memory is planned for the greatest sizes. With a free batch the example and check inputs stay whole.
    `external_data` puts the weights into `model.ptd` beside the program. `io_in_plan=False` leaves inputs and outputs
    out of the memory plan: the program then reads and writes the caller's memory, and XNNPACK may read up to 64 bytes
    past the end of an input.
    """
    from edgetune.export.lower import Layout
    from edgetune.export.pipeline import Bounds, export_program

    bounds = Bounds(min_same_prediction_pct=min_same_prediction_pct, max_abs_difference=max_abs_difference)
    return export_program(
        model,
        example_inputs,
        Path(path),
        device=device,
        target=target,
        check_inputs=check_inputs,
        bounds=bounds,
        carried=carried,
        sizes=dynamic,
        layout=Layout(weights_apart=external_data, holds_io=io_in_plan),
    )
