"""Weights that a captured graph computes: by weight norm, standardization, a parametrization.

A quantizer only rounds weights that are constants of the graph. A weight that is computed from constants alone becomes
one here; a weight that is computed from the inputs cannot.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from edgetune.capture.operators import module_of
from edgetune.core.errors import EdgetuneError

_aten = torch.ops.aten
_PRODUCTS = {
    _aten.linear.default, _aten.conv1d.default, _aten.conv1d.padding, _aten.conv2d.default, _aten.conv2d.padding,
    _aten.conv3d.default, _aten.conv3d.padding, _aten.conv_transpose1d.default, _aten.conv_transpose2d.input,
    _aten.conv_transpose3d.input, _aten.convolution.default,
}  # fmt: skip
_WEIGHT, _BIAS = 1, 2  # their places among the arguments


def fold_weights(graph_module: fx.GraphModule, skip: frozenset[str]) -> None:
    """Compute, in place, the weights and biases of linears and convolutions that do not depend on the inputs.

    Raises `EdgetuneError` for a layer not in `skip` whose weight does.
    """
    graph = graph_module.graph
    wanted: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target not in _PRODUCTS:
            continue
        for place in (_WEIGHT, _BIAS):
            source = node.args[place] if len(node.args) > place else None
            if not isinstance(source, fx.Node) or source.op == "get_attr":
                continue
            steps = _steps(source)
            if steps is not None:
                wanted[source] = steps
            elif place == _WEIGHT and (name := module_of(node)) not in skip:
                raise EdgetuneError(
                    f"{name or 'the model'} multiplies by a weight that it computes from its inputs",
                    action=f'leave it in floating point with skip: ["{name}"]' if name else "",
                )
    for index, (node, steps) in enumerate(wanted.items()):
        own = f"computed_weight_{index}"
        value = nn.Parameter(_value(graph_module, node, steps), requires_grad=False)
        graph_module.register_parameter(own, value)  # a parameter, as where batch norms are folded into it
        with graph.inserting_before(node):
            constant = graph.get_attr(own)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
    if wanted:
        graph.eliminate_dead_code()
        graph_module.recompile()


def _steps(node: fx.Node) -> list[fx.Node] | None:
    """The nodes to compute for this one, in the graph's order; None if it depends on an input or on random numbers."""
    pending, needed = [node], set()
    while pending:
        current = pending.pop()
        random = torch.Tag.nondeterministic_seeded in getattr(current.target, "tags", ())
        if current.op not in ("get_attr", "call_function") or random:
            return None
        if current not in needed:
            needed.add(current)
            pending += current.all_input_nodes
            # and in-place operators on the way
            pending += [user for user in current.users if _writes(user) and user.args[0] is current]
    return [step for step in node.graph.nodes if step in needed]


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _value(graph_module: fx.GraphModule, node: fx.Node, steps: list[fx.Node]) -> torch.Tensor:
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for step in steps:
            if step.op == "get_attr":
                tensor = operator.attrgetter(str(step.target))(graph_module)
                values[step] = tensor.detach().clone()
            else:
                args, kwargs = fx.node.map_arg((step.args, step.kwargs), values.__getitem__)
                values[step] = step.target(*args, **kwargs)  # type: ignore[operator]
    value: torch.Tensor = values[node]
    return value.contiguous()
