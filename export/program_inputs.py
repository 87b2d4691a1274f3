"""The inputs that a program is lowered for and compared on: example, rows, masks and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.capture import dynamic
from edgetune.capture.dynamic import Axis
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.inputs import Inputs, rows_of, tensors_of
from edgetune.core.modes import preserve_buffers
from edgetune.core.quiet import silence_libraries
from edgetune.program.artifact import validate_inputs
from edgetune.program.manifest import TensorSpec
from edgetune.runtime.allowed import allowed_difference
from edgetune.runtime.verify import Row, eager_outputs

_WHOLE = "leave out one_row: the program then takes inputs of the shapes of the example inputs"


@dataclass(frozen=True)
class ProgramInputs:
    """The inputs of a program, an example in its largest sizes, and the rows that it is compared on."""

    specs: tuple[TensorSpec, ...]
    example: Row
    rows: list[Row]
    tries: tuple[tuple[str, Row], ...]  # masks with a description: compared, but not counted as rows
    counted: str  # what to call `rows` in reports
    batch: Row | None = None  # several rows together, of which the program takes one

    def with_last(self, specs: tuple[TensorSpec, ...], tensors: Row) -> ProgramInputs:
        """The same with these tensors as the last inputs of every row."""
        return replace(
            self,
            specs=(*self.specs, *specs),
            example=(*self.example, *tensors),
            rows=[(*row, *tensors) for row in self.rows],
            tries=tuple((name, (*row, *tensors)) for name, row in self.tries),
            batch=None if self.batch is None else (*self.batch, *tensors),
        )


def prepare_inputs(
    example_inputs: Inputs, check_inputs: Sequence[Inputs] | None, axes: Sequence[Axis], *, one_row: bool
) -> ProgramInputs:
    """Check the inputs and arrange the rows for the comparison.

    With free axes, the rows in the sizes of `dynamic.sizes_to_check` come first, beginning with the largest and the
    smallest sizes.
    """
    if one_row and any(axis.dim == 0 for axis in axes):
        raise EdgetuneError("one_row is a batch of one, and the batch is free too", action="leave out one of them")
    names = names_of(example_inputs)
    split = _split_rows if one_row else _check_whole
    given = split(example_inputs, "the example inputs")
    example = given[0]
    specs = free_specs(example, names, axes)
    if check_inputs is not None:
        given = [
            validate_inputs(specs, r, "check_inputs") for batch in check_inputs for r in split(batch, "check_inputs")
        ]
    elif not axes:
        given = [validate_inputs(specs, row, "the example inputs") for row in given]
    batches = [tensors_of(b) for b in (example_inputs, *(check_inputs or ()))] if one_row else []
    batch = next((_contiguous(b) for b in batches if b[0].shape[0] > 1), None)
    counted = "held-out row" if one_row or check_inputs is not None else "input"
    if axes:
        sources = [*given, *([] if check_inputs is None else [example])]
        sizes = dynamic.sizes_to_check(axes)
        sized = [dynamic.resize_row(sources[i % len(sources)], axes, size) for i, size in enumerate(sizes)]
        given, example = [*sized, *given] if check_inputs is not None else sized, sized[0]
    return ProgramInputs(specs, example, given, _mask_half(names, given[0]), counted, batch)


def names_of(inputs: Inputs) -> tuple[str, ...]:
    """The names of the inputs in a manifest."""
    return tuple(inputs) if isinstance(inputs, dict) else tuple(f"input_{i}" for i in range(len(tensors_of(inputs))))


def specs_of(tensors: Row, names: Sequence[str], least: Row | None = None) -> tuple[TensorSpec, ...]:
    """The specs of the tensors in a manifest; `least` are the same in the smallest sizes."""
    specs = []
    for name, tensor, small in zip(names, tensors, least or tensors, strict=True):
        shape, low = tuple(tensor.shape), tuple(small.shape)
        dtype = str(tensor.dtype).removeprefix("torch.")
        specs.append(TensorSpec(name=name, shape=shape, dtype=dtype, smallest=low if low != shape else None))
    return tuple(specs)


def free_specs(example: Row, names: tuple[str, ...], axes: Sequence[Axis]) -> tuple[TensorSpec, ...]:
    """The specs of inputs whose `axes` are free."""
    if not axes:
        return specs_of(example, names)
    high, low = dynamic.sizes_to_check(axes)[:2]
    specs = specs_of(dynamic.resize_row(example, axes, high), names, dynamic.resize_row(example, axes, low))
    return tuple(
        spec.model_copy(update={"free": {axis.dim: axis.name for axis in axes if axis.place == place}})
        for place, spec in enumerate(specs)
    )


def _contiguous(tensors: Sequence[Tensor]) -> Row:
    return tuple(tensor.detach().cpu().contiguous() for tensor in tensors)


def _check_whole(inputs: Inputs, subject: str) -> list[Row]:
    """The inputs as one row, by position and contiguous."""
    tensors: Any = tensors_of(inputs)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        got = [type(tensor).__name__ for tensor in tensors]
        action = "convert arrays: torch.from_numpy(array)" if "ndarray" in got else "pass a tensor, a tuple or a dict"
        raise EdgetuneError(f"{subject} must be tensors, at least one", got=got, action=action, exit_code=Exit.EXPORT)
    if any(tensor.numel() == 0 for tensor in tensors):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise EdgetuneError(f"{subject} contain a tensor without values", got=shapes, exit_code=Exit.EXPORT)
    return [_contiguous(tensors)]


def _split_rows(inputs: Inputs, subject: str) -> list[Row]:
    """Every row of a batch as positional, contiguous tensors of batch 1."""
    (tensors,) = _check_whole(inputs, subject)
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors}
    if len(sizes) > 1 or 0 in sizes:
        raise EdgetuneError(
            f"one_row is set, but {subject} are not batch first: their first dimensions differ",
            got=[tuple(tensor.shape) for tensor in tensors],
            action=_WHOLE,
            exit_code=Exit.EXPORT,
        )
    return [_contiguous(tensors_of(rows_of(tensors, i, i + 1))) for i in range(sizes.pop())]


def _mask_half(names: Sequence[str], row: Row) -> tuple[tuple[str, Row], ...]:
    """The row with the second half of each text masked, if its attention mask masks nothing."""
    if "attention_mask" not in names:
        return ()
    place = names.index("attention_mask")
    mask = row[place]
    if mask.dim() != 2 or mask.shape[1] < 2 or not bool((mask != 0).all()):
        return ()
    half = mask.clone()
    half[:, mask.shape[1] // 2 :] = 0
    return (("a mask that hides the second half", (*row[:place], half, *row[place + 1 :])),)


def check_batch_first(model: nn.Module, batch: Row) -> None:
    """Raise if the first dimension of the inputs is not the batch: then one row alone gives another result.

    The last row of `batch` is compared, because the first step of a sequence gives the same with and without the
    others. An output without a dimension of the batch's size, such as a loss, is ignored if there is another.
    """
    with silence_libraries(), torch.no_grad():
        with preserve_buffers(model):
            together = eager_outputs(model, batch)
        try:
            single_row = eager_outputs(model, tuple(tensor[-1:] for tensor in batch))
        except Exception as error:  # the model's own code
            raise _batch_error(f"the model does not take one row: {type(error).__name__}: {error}") from error
    rows, allowed = batch[0].shape[0], allowed_difference(model)
    equal = 0
    for name, whole in together.items():
        single = single_row.get(name)
        if single is None or single.dim() != whole.dim():
            raise _batch_error(f"output {name} has another number of dimensions for one row")
        dims = [dim for dim in range(whole.dim()) if _shape_without(dim, whole) == _shape_without(dim, single)]
        dims = [dim for dim in dims if (whole.shape[dim], single.shape[dim]) == (rows, 1)]
        if dims and not any(_is_near(whole.narrow(dim, rows - 1, 1), single, allowed) for dim in dims):
            raise _batch_error(f"output {name} of one row differs from that row of a batch")
        equal += bool(dims)
    if not equal:
        raise _batch_error("no output has a dimension of the batch's size")


def _shape_without(dim: int, tensor: Tensor) -> list[int]:
    shape = list(tensor.shape)
    return shape[:dim] + shape[dim + 1 :]


def _is_near(one: Tensor, other: Tensor, allowed: float) -> bool:
    if not one.is_floating_point() or not bool(torch.isfinite(one).all()):
        return torch.equal(one, other) or one.is_floating_point()
    largest = float(one.abs().max()) if one.numel() else 0.0
    return largest == 0 or float((one - other).abs().max()) <= allowed * largest


def _batch_error(reason: str) -> EdgetuneError:
    return EdgetuneError(
        f"one_row is set, but the inputs are not batch first: {reason}",
        action=_WHOLE,
        exit_code=Exit.EXPORT,
    )
