"""What the repairs have in common: checks of shapes, and new nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

Repaired = Any  # the tensors in place of the operator's, or `NotImplemented` to keep the operator


def is_fixed(*tensors: Tensor) -> bool:
    """Whether every size is a number: XNNPACK takes a view to no other shape."""
    return all(isinstance(size, int) for tensor in tensors for size in tensor.shape)


def takes(*tensors: Tensor) -> bool:
    """Whether the tensors have fixed sizes and a type that XNNPACK computes in."""
    return is_fixed(*tensors) and all(t.dtype.is_floating_point and t.dtype.itemsize <= 4 for t in tensors)


def dims_of(dims: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """The dims in ascending order, counted from the front; all if none are given."""
    listed = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return tuple(sorted(dim % rank for dim in listed))


def add_node(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Add a node with the history of `like` and the value that it computes."""
    node = graph.call_function(target, args)
    node.meta = {key: value for key, value in like.meta.items() if key != "val"}
    node.meta["val"] = target(*fx.node.map_arg(args, lambda source: source.meta["val"]))
    return node
