"""Depthwise convolutions with a wide window, as sums of convolutions with narrow ones.

XNNPACK's depthwise kernels take up to 25 values under the window. A larger one it computes as a product for each
channel, which uses one column of sixteen. Rows of a window with equal gaps around its centre are a window of their own,
with that dilation: one of 7 x 7 is the sum of its rows {0, 3, 6}, {1, 5} and {2, 4}.
"""

from __future__ import annotations

from collections.abc import Container
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from edgetune.capture.operators import constants_of
from edgetune.capture.repairs.shapes import add_node

_ATEN = torch.ops.aten
_MOST_TAPS = 25


def split(program: ExportedProgram) -> None:
    """Write such convolutions of fp32 weights as sums."""
    split_graph(program.graph, constants_of(program))


def split_graph(graph: fx.Graph, constants: Container[str]) -> None:
    """The same in a graph of which the nodes called `constants` are weights. Their parts are slices, to be folded."""
    for node in list(graph.nodes):
        if node.target != _ATEN.conv2d.default or node.args[1].name not in constants:
            continue
        parts = _parts_of(node)
        if not parts or any("batch_norm" in str(user.target) for user in node.users):  # that is fused into a layer
            continue
        image, weight = node.args[:2]
        bias = node.args[2] if len(node.args) > 2 else None
        stride, _, _, groups = _settings(node)
        add = partial(add_node, graph, node)
        total: fx.Node | None = None
        with graph.inserting_before(node):
            for axis, rows, padding, dilation in parts:
                taps = add(_ATEN.slice.Tensor, weight, 2 + axis, rows.start, rows[-1] + 1, rows.step)
                term = add(_ATEN.conv2d.default, image, taps, bias, stride, padding, dilation, groups)
                total, bias = term if total is None else add(_ATEN.add.Tensor, total, term), None
        node.replace_all_uses_with(total)
        graph.erase_node(node)


Part = tuple[int, range, list[int], list[int]]  # axis of the window, its rows or columns, padding, dilation


def _parts_of(node: fx.Node) -> list[Part]:
    """The convolutions that it is the sum of; none if it needs no split, or cannot be."""
    weight: Tensor = node.args[1].meta["val"]  # type: ignore[union-attr]
    _, padding, dilation, groups = _settings(node)
    if weight.shape[1] != 1 or groups != len(weight) or weight.dtype != torch.float32:
        return []
    window = weight.shape[2:]
    if window.numel() <= _MOST_TAPS:
        return []
    ways = []
    for axis in (0, 1):
        sets = rows_around_the_centre(window[axis], _MOST_TAPS // window[1 - axis])
        parts: list[Part] = []
        for rows in sets:
            padded, gaps = list(padding), list(dilation)
            padded[axis] -= rows.start * dilation[axis]
            gaps[axis] *= rows.step
            parts.append((axis, rows, padded, gaps))
        if parts and all(padded[axis] >= 0 for _, _, padded, _ in parts):
            ways.append(parts)
    return min(ways, key=len, default=[])


def rows_around_the_centre(count: int, most: int) -> list[range]:
    """All of `count` rows, in sets of equal gaps that lie around the centre, of at most `most` rows each.

    >>> [list(rows) for rows in rows_around_the_centre(7, 3)]
    [[0, 3, 6], [1, 5], [2, 4]]
    """
    left, sets = set(range(count)), []
    while left:
        first = min(left)
        last = count - 1 - first
        gaps = (gap for gap in range(1, max(last - first, 1) + 1) if (last - first) % gap == 0)
        possible = (range(first, last + 1, gap) for gap in gaps)
        fit = [rows for rows in possible if len(rows) <= most and left.issuperset(rows)]
        if not fit:
            return []
        sets.append(max(fit, key=len))
        left -= set(sets[-1])
    return sets


def _settings(node: fx.Node) -> tuple[list[int], list[int], list[int], int]:
    """Stride, padding, dilation and groups."""
    given: list[Any] = [*node.args[3:], *[[1], [0], [1], 1][len(node.args[3:]) :]]
    stride, padding, dilation = (list(value) * (2 // len(value)) for value in given[:3])
    return stride, padding, dilation, given[3]
