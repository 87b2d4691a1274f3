"""The axes of every tensor of a recorded model, as rules for its operators find them one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from edgetune.capture.recorded import Recording, shape_of
from edgetune.prune.axes import Misaligned, UnitAxis, factorize, regroup, section

OUTPUT = "the model's output"
INPUTS = "the model's inputs or constants"  # which a recording does not tell apart
_REARRANGED = "a rearrangement of its outputs"

Axes = list[UnitAxis]


def fixed(size: int, reason: str) -> UnitAxis:
    """An axis that cannot be cut."""
    axis = UnitAxis(size)
    axis.block(reason)
    return axis


class Walk:
    """The axes of every tensor of a recording. `parameters`: by name, those that share a tensor have the same axes.

    `attended`: of each product of two activations the axis over which such products run in parallel, as over heads, and
    that of its columns. `groups`: the axis of the groups of a convolution, by layer.
    """

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self.model, self.recording = model, recording
        self.values: dict[fx.Node, Any] = {}
        self.parameters: dict[str, Axes] = {}
        self.attended: list[tuple[UnitAxis, UnitAxis]] = []
        self.groups: dict[str, UnitAxis] = {}

    def constant(self, node: fx.Node) -> Any:
        """The axes of a parameter, or of a tensor that the code holds: those cannot be cut."""
        names = self.recording.names.get(node, ()) or self.recording.buffers.get(node, ())
        if not names:
            return self.fixed_like(node.meta.get("val"), INPUTS)
        if names[0] not in self.parameters:
            axes = [UnitAxis(size) for size in shape_of(node)]
            self.parameters.update(dict.fromkeys(names, axes))
        return self.parameters[names[0]]

    def axes(self, value: Any) -> Axes:
        """The axes of a tensor."""
        axes: Axes = self.values[value]
        return axes

    def is_tensor(self, value: Any) -> bool:
        """Whether an argument is a tensor that is followed."""
        return (
            isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor) and self.values[value] is not None
        )

    def first(self, given: dict[str, Any]) -> Axes:
        """The axes of the first tensor among the arguments of an operator."""
        return self.axes(next(value for value in given.values() if self.is_tensor(value)))

    def is_parameter(self, value: Any) -> bool:
        """Whether it is a parameter, or a view of one."""
        while isinstance(value, fx.Node) and value.op != "get_attr" and len(value.all_input_nodes) == 1:
            value = value.all_input_nodes[0]
        return isinstance(value, fx.Node) and value.op == "get_attr"

    def block(self, node: fx.Node, reason: str) -> None:
        """No axis of what a node computes can be cut."""
        waiting = [self.values[node]]
        while waiting:
            value = waiting.pop()
            if isinstance(value, UnitAxis):
                value.block(reason)
            elif value is not None:
                waiting += value

    def fixed_like(self, value: Any, reason: str) -> Any:
        """Axes that cannot be cut, for a tensor or several."""
        if isinstance(value, Tensor):
            return [fixed(size, reason) for size in value.shape]
        return [self.fixed_like(part, reason) for part in value] if isinstance(value, (tuple, list)) else None

    def attend(self, parallel: UnitAxis, columns: UnitAxis) -> None:
        """A product of two activations."""
        self.attended.append((parallel, columns))

    def set_groups(self, weight: fx.Node, axis: UnitAxis) -> None:
        """The axis of the groups of a convolution."""
        for name in self.recording.names.get(weight, ()):
            self.groups[name.rpartition(".")[0]] = axis

    def layer_called(self, weight: Any, name: str) -> str:
        """A layer by its name and class, or an operator that has no weights by its own name."""
        for full in self.recording.names.get(weight, ()) if isinstance(weight, fx.Node) else ():
            layer = full.rpartition(".")[0]
            return f"{layer} ({type(self.model.get_submodule(layer)).__name__})"
        return name

    def try_factorize(self, axis: UnitAxis, outer: int) -> tuple[UnitAxis, UnitAxis]:
        """Two factors, or two axes that cannot be cut."""
        try:
            return factorize(axis, outer)
        except Misaligned:
            axis.block(_REARRANGED)
            return fixed(outer, _REARRANGED), fixed(axis.size // outer, _REARRANGED)

    def try_section(self, axis: UnitAxis, start: int, stop: int) -> UnitAxis:
        """A part of an axis, or one that cannot be cut."""
        try:
            return section(axis, start, stop)
        except Misaligned:
            axis.block("a slice")
            return fixed(stop - start, "a slice")

    def try_regroup(self, axes: Axes, sizes: Sequence[int]) -> Axes:
        """The axes of a view, or such that cannot be cut."""
        try:
            return regroup(axes, sizes)
        except Misaligned:
            for axis in axes:
                axis.block(_REARRANGED)
            return [fixed(size, _REARRANGED) for size in sizes]
