"""What a program is made for and tried on: an example as it stands or one row of it, rows, masks and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.capture import dynamic
from edgetune.capture.dynamic import Axis
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.inputs import Inputs, rows_of, tensors_of
from edgetune.core.modes import same_buffers
from edgetune.core.quiet import quiet
from edgetune.program.artifact import validate_inputs
from edgetune.program.manifest import TensorSpec
from edgetune.runtime.allowed import allowed_difference
from edgetune.runtime.verify import Row, eager_outputs

_AS_THEY_STAND = "leave out one_row: the program then takes inputs of the shapes of the example inputs"


@dataclass(frozen=True)
class Trial:
    """The inputs of a program, an example in its greatest sizes, and what it is compared on."""

    inputs: tuple[TensorSpec, ...]
    example: Row
    rows: list[Row]
    tries: tuple[tuple[str, Row], ...]  # masks, by a description: compared, but no rows
    counted: str  # what `rows` are
    batch: Row | None = None  # several rows together, of which the program takes one


def trial(
    example_inputs: Inputs, check_inputs: Sequence[Inputs] | None, axes: Sequence[Axis], *, one_row: bool
) -> Trial:
    """What a program for these inputs is made for and tried on.

    With free axes the rows come first in the sizes of `dynamic.sizes_to_check`, the greatest and then the least at
    the head, and after that as they were given.
    """
    if one_row and any(axis.dim == 0 for axis in axes):
        raise EdgetuneError("one_row is a batch of one, and the batch is free too", action="leave out one of them")
    names = names_of(example_inputs)
    split = _rows if one_row else _whole
    given = split(example_inputs, "the example inputs")
    example = given[0]
    inputs = free_specs(example, names, axes)
    if check_inputs is not None:
        given = [
            validate_inputs(inputs, row, "check_inputs") for some in check_inputs for row in split(some, "check_inputs")
        ]
    elif not axes:
        given = [validate_inputs(inputs, row, "the example inputs") for row in given]
    batches = [tensors_of(some) for some in (example_inputs, *(check_inputs or ()))] if one_row else []
    batch = next((_ordered(some) for some in batches if some[0].shape[0] > 1), None)
    counted = "held-out row" if one_row or check_inputs is not None else "input"
    if axes:
        seen = [*given, *([] if check_inputs is None else [example])]
        sizes = dynamic.sizes_to_check(axes)
        sized = [dynamic.resize_row(seen[i % len(seen)], axes, some) for i, some in enumerate(sizes)]
        given, example = [*sized, *given] if check_inputs is not None else sized, sized[0]
    return Trial(inputs, example, given, _masked(names, given[0]), counted, batch)


def names_of(inputs: Inputs) -> tuple[str, ...]:
    """The names of the inputs as a manifest states them."""
    return tuple(inputs) if isinstance(inputs, dict) else tuple(f"input_{i}" for i in range(len(tensors_of(inputs))))


def specs_of(tensors: Row, names: Sequence[str], least: Row | None = None) -> tuple[TensorSpec, ...]:
    """The tensors as a manifest states them; `least` are the same in the smallest sizes."""
    found = []
    for name, tensor, small in zip(names, tensors, least or tensors, strict=True):
        shape, low = tuple(tensor.shape), tuple(small.shape)
        dtype = str(tensor.dtype).removeprefix("torch.")
        found.append(TensorSpec(name=name, shape=shape, dtype=dtype, smallest=low if low != shape else None))
    return tuple(found)


def free_specs(example: Row, names: tuple[str, ...], axes: Sequence[Axis]) -> tuple[TensorSpec, ...]:
    """The inputs that a program with these axes takes."""
    if not axes:
        return specs_of(example, names)
    high, low = dynamic.sizes_to_check(axes)[:2]
    found = specs_of(dynamic.resize_row(example, axes, high), names, dynamic.resize_row(example, axes, low))
    return tuple(
        spec.model_copy(update={"free": {axis.dim: axis.name for axis in axes if axis.place == place}})
        for place, spec in enumerate(found)
    )


def _ordered(tensors: Sequence[Tensor]) -> Row:
    return tuple(tensor.detach().cpu().contiguous() for tensor in tensors)


def _whole(inputs: Inputs, what: str) -> list[Row]:
    """The inputs as they stand, by position and in memory order."""
    tensors: Any = tensors_of(inputs)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        got = [type(tensor).__name__ for tensor in tensors]
        action = (
            "give tensors: torch.from_numpy(array)" if "ndarray" in got else "give a tensor, a tuple or a dict of them"
        )
        raise EdgetuneError(f"{what} must be tensors, at least one", got=got, action=action, exit_code=Exit.EXPORT)
    if any(tensor.numel() == 0 for tensor in tensors):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise EdgetuneError(f"{what} contain a tensor without values", got=shapes, exit_code=Exit.EXPORT)
    return [_ordered(tensors)]


def _rows(inputs: Inputs, what: str) -> list[Row]:
    """Every row of a batch as positional tensors of batch 1, in memory order."""
    (tensors,) = _whole(inputs, what)
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors}
    if len(sizes) > 1 or 0 in sizes:
        raise EdgetuneError(
            f"one row was asked for, but {what} are not batch first: their first dimensions differ",
            got=[tuple(tensor.shape) for tensor in tensors],
            action=_AS_THEY_STAND,
            exit_code=Exit.EXPORT,
        )
    return [_ordered(tensors_of(rows_of(tensors, i, i + 1))) for i in range(sizes.pop())]


def _masked(names: Sequence[str], row: Row) -> tuple[tuple[str, Row], ...]:
    """The row with the second half of each text hidden, where it has an attention mask that hides nothing."""
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
    """Raise where the first dimension of the inputs is not that of the rows: one row gives something else alone.

    `batch` holds at least two, and the last is taken: of a sequence the first step alone gives what it gives at the
    head of the others. An output has its rows along a dimension that grows with them; one that has none, such
    as a loss, says nothing as long as another does.
    """
    with quiet(), torch.no_grad():
        with same_buffers(model):
            together = eager_outputs(model, batch)
        try:
            alone = eager_outputs(model, tuple(tensor[-1:] for tensor in batch))
        except Exception as error:  # the model's own code
            raise _not_batch_first(f"the model does not take one row: {type(error).__name__}: {error}") from error
    rows, allowed = batch[0].shape[0], allowed_difference(model)
    equal = 0
    for name, whole in together.items():
        single = alone.get(name)
        if single is None or single.dim() != whole.dim():
            raise _not_batch_first(f"output {name} has another form for one row")
        dims = [dim for dim in range(whole.dim()) if _without(dim, whole) == _without(dim, single)]
        dims = [dim for dim in dims if (whole.shape[dim], single.shape[dim]) == (rows, 1)]
        if dims and not any(_near(whole.narrow(dim, rows - 1, 1), single, allowed) for dim in dims):
            raise _not_batch_first(f"output {name} of one row differs from that row of a batch")
        equal += bool(dims)
    if not equal:
        raise _not_batch_first("no output grows with the rows")


def _without(dim: int, tensor: Tensor) -> list[int]:
    shape = list(tensor.shape)
    return shape[:dim] + shape[dim + 1 :]


def _near(one: Tensor, other: Tensor, allowed: float) -> bool:
    if not one.is_floating_point() or not bool(torch.isfinite(one).all()):
        return torch.equal(one, other) or one.is_floating_point()
    largest = float(one.abs().max()) if one.numel() else 0.0
    return largest == 0 or float((one - other).abs().max()) <= allowed * largest


def _not_batch_first(what: str) -> EdgetuneError:
    return EdgetuneError(
        f"one row was asked for, but the inputs are not batch first, their first dimension is not that of rows: {what}",
        action=_AS_THEY_STAND,
        exit_code=Exit.EXPORT,
    )
