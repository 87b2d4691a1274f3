"""Operators that return their input: aliases, detached tensors, dropout in eval mode."""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram

_ATEN = torch.ops.aten
_SAME = (_ATEN.alias.default, _ATEN.detach.default, _ATEN.detach_.default, _ATEN.lift_fresh.default)


def drop(program: ExportedProgram) -> None:
    """Replace such operators by their input; outputs of the program keep their own node."""
    graph = program.graph
    outputs = set(graph.output_node().all_input_nodes)
    for node in list(graph.nodes):
        if node.op == "call_function" and node not in outputs and _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _is_identity(node: fx.Node) -> bool:
    if node.target in _SAME:
        return True
    if node.target == _ATEN.dropout.default:
        return bool(node.args[2] is False or node.args[1] == 0.0)
    plain = node.kwargs.get("memory_format") is None
    return plain and node.target is _ATEN.clone.default  # dropout, once traced
