"""What the repairs ask of shapes, and what they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

Repaired = Any  # what replaces the operator's tensors, or `NotImplemented`: the operator stays


def is_fixed(*tensors: Tensor) -> bool:
    """Whether every size is a number: XNNPACK takes a view to no other shape."""
    return all(isinstance(size, int) for tensor in tensors for size in tensor.shape)


def takes(*tensors: Tensor) -> bool:
    """Whether the tensors have fixed sizes and a type that XNNPACK computes in."""
    return is_fixed(*tensors) and all(t.dtype.is_floating_point and t.dtype.itemsize <= 4 for t in tensors)


def dims_of(dims: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """The dims in ascending order, none of them negative; all of them for none."""
    listed = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return tuple(sorted(dim % rank for dim in listed))


def called(graph: fx.Graph, like: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """A node with the history of `like`, and the value that it computes."""
    made = graph.call_function(target, args)
    made.meta = {key: value for key, value in like.meta.items() if key != "val"}
    made.meta["val"] = target(*[a.meta["val"] if isinstance(a, fx.Node) else a for a in args])
    return made


def calling(graph: fx.Graph, like: fx.Node) -> Callable[..., fx.Node]:
    """A function that adds a node, `call(operator, *args)`, with the history of `like` and the value it computes."""

    def call(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        made.meta = {key: value for key, value in like.meta.items() if key != "val"}
        made.meta["val"] = target(*fx.node.map_arg(args, lambda node: node.meta["val"]))
        return made

    return call
