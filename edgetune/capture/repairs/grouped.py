"""Grouped-query attention without copies of keys and values for each head of a group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

_ATEN = torch.ops.aten
_ATTENTION = _ATEN.scaled_dot_product_attention.default
_RESHAPES = (_ATEN.reshape.default, _ATEN.view.default, _ATEN._unsafe_view.default)
_SAME = (_ATEN.slice.Tensor, _ATEN.clone.default, _ATEN.contiguous.default, _ATEN.alias.default)


def share_keys(program: ExportedProgram) -> None:
    """Give attention the keys and values before `expand`, and let it do the grouping."""
    for node in program.graph.nodes:
        if node.target != _ATTENTION or node.kwargs.get("enable_gqa"):
            continue
        key, value = (_before_repeat(side) for side in node.args[1:3])
        if key is None or value is None or _value(key).shape[:-1] != _value(value).shape[:-1]:
            continue
        node.args = (node.args[0], key, value, *node.args[3:])
        node.kwargs = {**node.kwargs, "enable_gqa": True}
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


def _before_repeat(node: Any) -> fx.Node | None:
    """`x` of `x[:, :, None].expand(b, heads, groups, length, width).reshape(b, heads * groups, length, width)`."""
    if node.target not in _RESHAPES or _value(node).dim() != 4:
        return None
    expanded = _through(node.args[0])
    if expanded.target != _ATEN.expand.default or _value(expanded).dim() != 5:
        return None
    batch, heads, groups, length, width = _value(expanded).shape
    single = _through(expanded.args[0])
    if single.target != _ATEN.unsqueeze.default or single.args[1] not in (2, -3):
        return None
    original = _through(single.args[0])
    same = tuple(_value(original).shape) == (batch, heads, length, width)
    return original if same and tuple(_value(node).shape) == (batch, heads * groups, length, width) else None


def _through(node: Any) -> fx.Node:
    """Past operators that change neither shape nor values."""
    while node.target in _SAME and _value(node).shape == _value(node.args[0]).shape:
        node = node.args[0]
    source: fx.Node = node
    return source


def _value(node: fx.Node) -> Tensor:
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else torch.empty(0)
