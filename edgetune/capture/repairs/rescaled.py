"""A quantized tensor that is cut, reordered or padded.

With executorch 1.4 and 1.5, XNNPACK moves integers if a move is between two roundings. With two scales such a program
does not load; with one, slices, views and permutations of images are laid out wrongly: wrong values, or memory that is
freed twice. A padding counts as quantized although its reader is not, and does not load either. A product by one keeps
the move in floating point, with a conversion before and after it.

A dequantized tensor with two readers gets the type and memory order that the last one needs, for both: wrong values, or
sizes that do not fit. One that is rounded again by the same scale, as after a dropout, must not be. So each reader gets
its own conversion, and nothing is rounded twice.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram

from edgetune.capture.repairs.shapes import add_node

_ATEN = torch.ops.aten
_MOVES = (
    _ATEN.slice.Tensor, _ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default, _ATEN.permute.default,
    _ATEN.transpose.int, _ATEN.squeeze.dim, _ATEN.squeeze.dims, _ATEN.unsqueeze.default,
)  # fmt: skip
_SAFE = (_ATEN.max_pool2d.default, _ATEN.relu.default)  # with one scale
_PADS = (_ATEN.pad.default, _ATEN.constant_pad_nd.default)


def separate_moves(program: ExportedProgram) -> None:
    """Separate moves from the rounding after them, paddings from the values before them, and readers of a tensor."""
    graph = program.graph
    _round_once(graph)
    for node in list(graph.nodes):
        before = node.args[0] if node.target in (*_MOVES, *_SAFE, *_PADS) else None
        if not isinstance(before, fx.Node) or not _is(before, "dequantize_per_tensor"):
            continue
        rounded = [user for user in node.users if _is(user, "quantize_per_tensor")]
        if node.target in _PADS and not rounded:
            _part(graph, before, node)
        elif node.target not in _PADS and len(node.users) == 1 and rounded:
            same = before.args[1:] == rounded[0].args[1:]
            if not (same and (node.target in _SAFE or _is_flat(before))):
                _part(graph, node, rounded[0])
    _share_none(graph)


def _round_once(graph: fx.Graph) -> None:
    """Drop a conversion to floating point and back."""
    for node in list(graph.nodes):
        before = node.args[0] if _is(node, "quantize_per_tensor") else None
        if isinstance(before, fx.Node) and _is(before, "dequantize_per_tensor") and before.args[1:] == node.args[1:]:
            node.replace_all_uses_with(before.args[0])
            graph.erase_node(node)


def _share_none(graph: fx.Graph) -> None:
    """A conversion to floating point for each operator that reads one."""
    for node in list(graph.nodes):
        for reader in list(node.users)[1:] if _is(node, "dequantize_per_tensor") else ():
            with graph.inserting_before(reader):
                reader.replace_input_with(node, graph.node_copy(node))


def _part(graph: fx.Graph, node: fx.Node, reader: fx.Node) -> None:
    with graph.inserting_before(reader):
        value = add_node(graph, node, _ATEN.mul.Tensor, node, 1.0)
    reader.replace_input_with(node, value)


def _is(node: fx.Node, operator: str) -> bool:
    return str(node.target) == f"quantized_decomposed.{operator}.default"


def _is_flat(node: fx.Node) -> bool:
    """Whether channels first and last have the same memory order, as for a pooled image."""
    shape: tuple[int, ...] = tuple(node.meta["val"].shape)
    return sum(size != 1 for size in shape[1:]) <= 1
