"""Follow axes through a model: which positions of which parameters belong together."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx, nn

from edgetune.capture.recorded import record
from edgetune.core.inputs import Inputs
from edgetune.prune import axis_moves  # noqa: F401  it registers its rules
from edgetune.prune.axes import Misaligned
from edgetune.prune.axis_rules import find_rule, unknown
from edgetune.prune.walk import INPUTS, OUTPUT, Walk


def follow(model: nn.Module, inputs: Inputs) -> Walk:
    """Run the model on the first rows of `inputs`, and follow the axes of its parameters through all operators.

    Raises `EdgetuneError` if the model does not run on them.
    """
    walk = Walk(model, record(model, inputs))
    for node in walk.recording.graph.nodes:
        walk.values[node] = _run(walk, node)
    return walk


def _run(walk: Walk, node: fx.Node) -> Any:
    if node.op == "get_attr":
        return walk.constant(node)
    if node.op == "placeholder":
        return walk.fixed_like(node.meta.get("val"), INPUTS)
    if node.op == "output":
        for source in node.all_input_nodes:
            walk.block(source, OUTPUT)
        return None
    if node.target is operator.getitem:
        whole, place = node.args
        try:
            return walk.values[whole][place]  # type: ignore[index]
        except (IndexError, TypeError):  # of an operator that no rule knows
            return walk.fixed_like(node.meta.get("val"), "an operator of several results")
    value = node.meta.get("val")
    if not isinstance(value, (Tensor, tuple, list)):
        return None
    find_axes = find_rule(node)
    if find_axes is None:
        return unknown(walk, node, {})
    try:
        return find_axes(walk, node, _arguments(node))
    except (Misaligned, ValueError, IndexError, KeyError, TypeError, StopIteration):
        return unknown(walk, node, {})  # called in a form that the rule does not know


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, those that were not given left out."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    named = dict(zip(names, node.args, strict=False)) if names else dict(enumerate(node.args))
    return {**named, **node.kwargs}  # type: ignore[dict-item]
