"""Dynamic sizes: axes of the inputs, their bounds, and rows to check them with."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgetune.core.errors import EdgetuneError, Exit

_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.reshape.default)

Dynamic = Mapping[str, tuple[int, int]]
"""Least and greatest size by the name of an axis.

`batch` is the first axis of every input and `tokens` the second of all that are as long there as the first input.
Any other is written as `INPUT.AXIS` (`pixels.2`, `input_0.1`); axes that always have the same size are separated by
commas.
"""


@dataclass(frozen=True)
class Axis:
    """One axis of one input, and the sizes that it may have. Axes of one name have one size."""

    name: str
    place: int  # of the input
    dim: int
    low: int
    high: int


def axes_of(dynamic: Dynamic, names: Sequence[str], example: Sequence[Tensor]) -> tuple[Axis, ...]:
    """The dynamic axes. Raises `EdgetuneError` for an axis that no input has, and for invalid bounds."""
    axes: list[Axis] = []
    for name, bounds in dynamic.items():
        low, high = _bounds(name, bounds)
        axes += [Axis(name, place, dim, low, high) for place, dim in _places(name, names, example)]
    taken = [(axis.place, axis.dim) for axis in axes]
    twice = [axis for axis in axes if taken.count((axis.place, axis.dim)) > 1]
    if twice:
        message = f"axis {twice[0].dim} of {names[twice[0].place]} is asked for twice"
        raise EdgetuneError(message, got=[axis.name for axis in twice], action="name each axis once")
    return tuple(axes)


def _bounds(name: str, bounds: Any) -> tuple[int, int]:
    try:
        low, high = (int(bound) for bound in bounds)
    except (TypeError, ValueError):
        low, high = 0, 0
    if not 1 <= low < high:
        action = f'write {{"{name}": (1, 64)}}: the least size and a greater one'
        raise EdgetuneError(f"{name} needs a minimum and a maximum size", got=bounds, action=action)
    return low, high


def _places(name: str, names: Sequence[str], example: Sequence[Tensor]) -> list[tuple[int, int]]:
    if name == "batch" and all(tensor.dim() for tensor in example):
        return [(place, 0) for place in range(len(example))]
    if name == "tokens" and example[0].dim() > 1:
        length = example[0].shape[1]
        return [(place, 1) for place, t in enumerate(example) if t.dim() > 1 and t.shape[1] == length]
    positions = []
    for one in name.split(","):
        input_name, _, axis = one.strip().rpartition(".")
        place = names.index(input_name) if input_name in names else -1
        if place < 0 or not axis.isdecimal() or int(axis) >= example[place].dim():
            allowed = [f"{n}.{dim}" for n, t in zip(names, example, strict=True) for dim in range(t.dim())]
            raise EdgetuneError("no such axis", got=one, allowed=["batch", "tokens", *allowed])
        positions.append((place, int(axis)))
    return positions


def parse_bounds(asked: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Parse bounds from the command line.

    >>> parse_bounds(["tokens=1:64", "pixels.2,pixels.3=64:256"])
    {'tokens': (1, 64), 'pixels.2,pixels.3': (64, 256)}
    """
    bounds = {}
    for one in asked:
        match = re.fullmatch(r"([^=]+)=(\d+):(\d+)", one)
        if match is None or match[1] in bounds:
            action = "write it as tokens=1:64, once for each axis"
            raise EdgetuneError("this is not a size with bounds", got=one, action=action)
        bounds[match[1]] = (int(match[2]), int(match[3]))
    return bounds


def sizes_to_check(axes: Sequence[Axis]) -> list[dict[str, int]]:
    """Sizes by name: the greatest, the least, halfway, each at its least with the others at their greatest.

    The greatest come again at the end, since a program must also grow after it has shrunk.
    """
    bounds = {axis.name: (axis.low, axis.high) for axis in axes}
    high = {name: most for name, (_, most) in bounds.items()}
    low = {name: least for name, (least, _) in bounds.items()}
    half = {name: (least + most) // 2 for name, (least, most) in bounds.items()}
    mixed = [{**high, name: least} for name, (least, _) in bounds.items()] if len(bounds) > 1 else []
    return [high, low, half, *mixed, high]


def resize_row(row: Sequence[Tensor], axes: Sequence[Axis], sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
    """The row with these sizes: cut, or repeated from its start."""
    tensors = list(row)
    for axis in axes:
        tensor, size = tensors[axis.place], sizes[axis.name]
        tensors[axis.place] = tensor.index_select(axis.dim, torch.arange(size) % tensor.shape[axis.dim])
    return tuple(tensor.contiguous() for tensor in tensors)


def shapes_for(model: nn.Module, axes: Sequence[Axis], inputs: int) -> Any:
    """`dynamic_shapes` of `torch.export.export` for a model with `inputs` inputs; `None` if all sizes are fixed."""
    if not axes:
        return None
    dims = {axis.name: _dim(axis) for axis in axes}
    shapes = tuple({axis.dim: dims[axis.name] for axis in axes if axis.place == place} for place in range(inputs))
    parameters = inspect.signature(model.forward).parameters.values()
    return (shapes,) if any(p.kind is p.VAR_POSITIONAL for p in parameters) else shapes


def _dim(axis: Axis) -> Any:
    return torch.export.Dim(re.sub(r"\W+", "_", axis.name), min=axis.low, max=axis.high)


def free_sizes(inputs: Sequence[Tensor], rows: Any) -> tuple[dict[int, Any], ...]:
    """`dynamic_shapes` of a graph for any number of rows, and of tokens where its model takes more than one number."""
    tokens = {tensor.shape[1] for tensor in inputs if tensor.dim() == 2 and not tensor.is_floating_point()}
    return tuple(
        {0: rows, 1: torch.export.Dim.AUTO} if tensor.dim() == 2 and tokens == {tensor.shape[1]} else {0: rows}
        for tensor in inputs
    )


def infer_views(program: ExportedProgram) -> None:
    """Write -1 for the dynamic size of every view that has only one: XNNPACK takes no other view with dynamic sizes.

    The layers of a text model of dynamic length then form fewer delegates, with less memory between them.
    """
    for node in program.graph.nodes:
        if node.target in _VIEWS:
            sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
            if sizes.count(-1) == 1:
                node.args = (node.args[0], sizes)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


def bounds_error(axes: Sequence[Axis], error: Exception) -> EdgetuneError | None:
    """The error for a model that does not accept every size within the bounds; `None` for another error."""
    text = str(error)
    if "Constraints violated" not in text and "ConstraintViolation" not in type(error).__name__:
        return None
    lines = [line.strip(" -\t") for line in text.splitlines() if line.strip()]
    reason = next((line for line in lines[1:] if not line.endswith(":")), lines[0] if lines else "")
    return EdgetuneError(
        f"the model does not take every size within the bounds: {reason[:400]}",
        got={axis.name: (axis.low, axis.high) for axis in axes},
        action="leave the axis out, narrow its bounds, or name axes of one size together: 'a.1,b.1'",
        exit_code=Exit.EXPORT,
    )
