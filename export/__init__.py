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
    one_row: bool = False,
    min_same_prediction_pct: float = 99.0,
    max_abs_difference: float | None = None,
    max_relative_difference: float | None = None,
    carried: Carried | None = None,
    dynamic: Dynamic | None = None,
    external_data: bool = False,
    io_in_plan: bool = True,
) -> Artifact:
    """Lower `model` to `path` (a `.pte`), prove that it computes the same, and write `model.json` beside it.

    The program takes the tensors of `example_inputs` by position, in the shapes that they have, and returns every
    tensor that the model does: `model.json` has their names. With `one_row` it takes one row of each (batch 1), and
    the rows of the example inputs and of `check_inputs` are taken apart along the first dimension. `device` is an id
    from `edgetune devices list`; its first target is taken where `target` is None. `check_inputs` are inputs to
    compare on, in the program's shapes; without them the example inputs are used.

    Raises `EdgetuneError` (exit code 5) when the model cannot be lowered or returns something else than tensors, the
    program does not load or run, a value is not finite, or the program is too far from the model, which it is where a
    value of any output differs by more than `max_relative_difference` of the largest absolute value of that output
    (None: 1e-3 in floating point, 1e-2 in fp16, 5e-2 in bf16 and where activations are rounded to 8 bits as they come,
    0.25 where by fixed scales; whole numbers are equal) or by more than `max_abs_difference`, or where fewer than
    `min_same_prediction_pct` of the predictions are the same. The error names the innermost module in which the
    difference begins. Nothing is left at `path` then that was not there before.

    `carried` is what an app needs beside the program: it goes into `model.json`, its tokenizer to
    `model.tokenizer.json`, and a model card to `model.md`.

    `dynamic` lets sizes differ between calls: `{"tokens": (1, 64), "batch": (1, 8)}`, or any axis by its name, as in
    `{"pixels.2": (64, 256)}` (see `edgetune.export.dynamic`). The program is compared at the bounds and between them,
    and its memory is planned for the greatest sizes.
    `external_data` puts the weights into `model.ptd` beside the program. `io_in_plan=False` leaves inputs and outputs
    out of the memory plan: the program then reads and writes the caller's memory, and XNNPACK may read up to 64 bytes
    past the end of an input.
    """
    from edgetune.export.lower import Layout
    from edgetune.export.pipeline import Bounds, export_program

    bounds = Bounds(min_same_prediction_pct, max_abs_difference, max_relative_difference)
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
        one_row=one_row,
        layout=Layout(weights_apart=external_data, holds_io=io_in_plan),
    )
