"""Products of two computed matrices, as batched ones: XNNPACK packs the second operand of a plain one as a weight."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from edgetune.capture.operators import constants_of
from edgetune.capture.repairs.shapes import add_node, is_fixed

_ATEN = torch.ops.aten


def batch(program: ExportedProgram) -> None:
    """Write `mm` and the `matmul` by a matrix as `bmm` where the second operand is not a constant."""
    constants, graph = constants_of(program), program.graph
    for node in list(graph.nodes):
        if node.target not in (_ATEN.mm.default, _ATEN.matmul.default):
            continue
        left, right = node.args
        if right.name in constants or "quantize" in str(right.target) or _rank(left) < 2 or _rank(right) != 2:
            continue
        depth, width = left.meta["val"].shape[-1], right.meta["val"].shape[-1]
        add = partial(add_node, graph, node)
        with graph.inserting_before(node):
            rows = add(_ATEN.reshape.default, left, [1, -1, depth])
            product = add(_ATEN.bmm.default, rows, add(_ATEN.reshape.default, right, [1, depth, width]))
            flat = add(_ATEN.reshape.default, product, list(node.meta["val"].shape))
        node.replace_all_uses_with(flat)
        graph.erase_node(node)


def _rank(node: Any) -> int:
    """The rank of a tensor of fixed sizes, else -1."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, torch.Tensor) and is_fixed(value) else -1
