"""Export to ExecuTorch: the only room that imports executorch's compiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from edgetune.capture.dynamic import Dynamic
from edgetune.core.errors import EdgetuneError
from edgetune.core.floats import FloatType
from edgetune.core.inputs import Inputs
from edgetune.program.artifact import Artifact
from edgetune.program.carried import Carried
from edgetune.program.manifest import AdapterForm, Manifest

__all__ = ["Artifact", "Carried", "Manifest", "export"]


def export(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | Path,
    *,
    device: str | None = None,
    target: str | None = None,
    dtype: FloatType = "fp32",
    check_inputs: Sequence[Inputs] | None = None,
    one_row: bool = False,
    min_same_prediction_pct: float = 99.0,
    max_abs_difference: float | None = None,
    max_relative_difference: float | None = None,
    carried: Carried | None = None,
    dynamic: Dynamic | None = None,
    external_data: bool = False,
    io_in_plan: bool = True,
    adapters: Mapping[str, str | Path] | None = None,
    form: AdapterForm = "inputs",
    adapter_rank: int | None = None,
) -> Artifact:
    """Lower `model` to `path` (a `.pte`), verify that it computes the same, and write `model.json` next to it.

    The program takes the tensors of `example_inputs` by position, with their shapes, and returns every tensor that
    the model returns; `model.json` has their names. With `one_row` it takes one row of each (batch size 1), and the
    example inputs and `check_inputs` are split into rows along the first dimension. `device` is an id from `edgetune
    devices list`; its first target is used if `target` is None. `check_inputs` are inputs for the comparison, in the
    shapes of the program; the default is the example inputs.

    Raises `EdgetuneError` (exit code 5) if the model cannot be lowered or returns anything but tensors, if the
    program does not load or run, if a value is not finite, or if the program differs too much from the model. That
    is the case if a value of any output differs by more than `max_relative_difference` of the largest absolute value
    of that output (None: 1e-3 in floating point, 7.8e-3 in fp16, 6.3e-2 in bf16, 5e-2 with dynamic 8-bit activations,
    0.25 with static ones; integers must be equal) or by more than `max_abs_difference`, or if fewer than
    `min_same_prediction_pct` of the predictions agree. The error names the innermost module in which the difference
    begins. Then nothing new is left at `path`.

    `dtype` is the type that the program computes in: "fp32", "bf16" or "fp16". In 16 bits it is half as large, called
    with the types of the model as before, and compared with the model as it is. XNNPACK computes almost everything
    in fp16; in bf16 it has no convolutions, and attention stays in fp32.

    `carried` is the metadata that an app needs: it is written to `model.json`, its tokenizer to
    `model.tokenizer.json`, and a model card to `model.md`.

    `dynamic` allows sizes to differ between calls: `{"tokens": (1, 64), "batch": (1, 8)}`, or any axis by its name, as
    in `{"pixels.2": (64, 256)}` (see `edgetune.capture.dynamic`). The program is compared at the bounds and between
    them, and its memory is planned for the largest sizes.
    `external_data` stores the weights in `model.ptd` next to the program. `io_in_plan=False` excludes inputs and
    outputs from the memory plan: the program then reads and writes the caller's memory, and XNNPACK may read up to
    64 bytes past the end of an input.

    `adapters` are adapters for `model`, the plain base, by name: folders in peft's format. One of another family than
    LoRA becomes the nearest LoRA of `adapter_rank`, by default of the lowest rank within 1 % of what it adds to the
    weights of every layer; `model.json` has the error. The program computes
    the base and a side path of two products beside each adapted layer, and every adapter is compared with the model
    that has it. With `form="inputs"` the matrices are inputs of the program, and each adapter is a small file
    `model.NAME.safetensors` of their values: a program changes its adapter from one call to the next, and zeros are the
    base. With `form="files"` each adapter is a file `model.NAME.ptd`, which is loaded beside the base's `model.ptd`.
    With `form="methods"` all are in the program: each is a method of its name beside the method `base`. The base's
    weights are stored once, but a runtime packs them for each method that it loads; values are compared, not
    predictions.
    """
    from edgetune.core.apply import check_model
    from edgetune.export.adapter_methods import export_adapters_as_methods
    from edgetune.export.lower import Layout
    from edgetune.export.pipeline import export_program
    from edgetune.runtime.verify import Bounds

    check_model(model, "export")
    if not isinstance(path, (str, Path)):
        action = 'write et.export(model, example_inputs, "model.pte")'
        raise EdgetuneError(
            "the third argument must be the path", where="et.export", got=type(path).__name__, action=action
        )

    if adapters is not None and form == "methods":
        return export_adapters_as_methods(
            model,
            example_inputs,
            Path(path),
            adapters,
            adapter_rank=adapter_rank,
            device=device,
            target=target,
            dtype=dtype,
            check_inputs=check_inputs,
            one_row=one_row,
            dynamic=dynamic,
            external_data=external_data,
            io_in_plan=io_in_plan,
            max_relative_difference=max_relative_difference,
            carried=carried,
        )
    bounds = Bounds(min_same_prediction_pct, max_abs_difference, max_relative_difference)
    return export_program(
        model,
        example_inputs,
        Path(path),
        device=device,
        target=target,
        dtype=dtype,
        check_inputs=check_inputs,
        bounds=bounds,
        carried=carried,
        sizes=dynamic,
        one_row=one_row,
        layout=Layout(external_data=external_data, io_in_plan=io_in_plan),
        adapters=adapters,
        form=form,
        adapter_rank=adapter_rank,
    )
