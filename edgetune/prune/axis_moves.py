"""How axes go through operators that only move values: views, slices, concatenations."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edgetune.capture.recorded import shape_of
from edgetune.prune.axes import Misaligned, UnitAxis, concatenation, product, unify
from edgetune.prune.axis_rules import rule
from edgetune.prune.walk import Axes, Walk, fixed


@rule(
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as", "ravel",
    "_reshape_alias",
)  # fmt: skip
def view(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """The same positions in other dimensions."""
    return walk.try_regroup(walk.first(given), shape_of(node))


@rule("permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "mT", "numpy_T", "adjoint")
def turned(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """The dimensions in another order: that in which the operator puts the strides of a tensor."""
    x = walk.first(given)
    numbered = torch.empty([n + 2 for n in range(len(x))], device="meta")  # each size stands for its dimension
    others = {name: value for name, value in given.items() if not walk.is_tensor(value)}
    result = node.target(numbered, *others.values())  # type: ignore[operator]
    return [x[size - 2] for size in result.shape]


@rule("repeat", "tile")
def repeated(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """The whole tensor, several times in each dimension."""
    x, shape = walk.first(given), shape_of(node)
    x = [*[UnitAxis(1)] * (len(shape) - len(x)), *x]
    return [product([UnitAxis(size // max(axis.size, 1)), axis]) for axis, size in zip(x, shape, strict=True)]


@rule("repeat_interleave")
def interleaved(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """Each position several times in a row."""
    x, dim = walk.axes(given["self"]), given.get("dim")
    if not isinstance(given.get("repeats"), int) or dim is None:
        raise Misaligned
    result = list(x)
    result[dim] = product([x[dim], UnitAxis(given["repeats"])])
    return result


@rule("slice", "narrow")
def sliced(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """Some positions of one dimension."""
    x, dim, shape = walk.axes(given["self"]), given.get("dim", 0), shape_of(node)
    result, size = list(x), shape[given.get("dim", 0)]
    if size == x[dim].size:
        return result
    start = given.get("start") or 0
    start += x[dim].size if start < 0 else 0
    if not isinstance(start, int) or given.get("step", 1) != 1:
        x[dim].block("a slice with steps")
        result[dim] = fixed(size, "a slice with steps")
        return result
    result[dim] = walk.try_section(x[dim], start, start + size)
    return result


@rule("select")
def selected(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """One position of a dimension."""
    x, dim = list(walk.axes(given["self"])), given["dim"]
    x[dim].block("its positions are selected by number")
    return [axis for n, axis in enumerate(x) if n != dim % len(x)]


@rule("unbind")
def unbound(walk: Walk, node: fx.Node, given: dict[str, Any]) -> list[Axes]:
    """Every position of a dimension by itself."""
    count = len(node.meta["val"])
    return [selected(walk, node, {"self": given["self"], "dim": given.get("dim", 0)}) for _ in range(count)]


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes")
def divided(walk: Walk, node: fx.Node, given: dict[str, Any]) -> list[Axes]:
    """A dimension in pieces: equal ones have one axis, so that they stay equal."""
    x, dim = walk.axes(given["self"]), given.get("dim", 0)
    values = node.meta["val"]
    if len({piece.shape[dim] for piece in values}) == 1:
        _, own = walk.try_factorize(x[dim], len(values))
        axes = list(x)
        axes[dim] = own
        return [list(axes) for _ in values]
    pieces, start = [], 0
    for piece in values:
        size = piece.shape[dim]
        axes = list(x)
        axes[dim] = walk.try_section(x[dim], start, start + size)
        pieces.append(axes)
        start += size
    return pieces


@rule("cat", "concat", "concatenate")
def joined(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """Pieces, one after the other in one dimension."""
    pieces = [walk.axes(value) for value in given["tensors"] if shape_of(value).numel()]
    dim = given.get("dim", 0)
    result = list(pieces[0])
    for axes in pieces[1:]:
        for n, (axis, first) in enumerate(zip(axes, result, strict=True)):
            if n != dim % len(axes):
                unify(first, axis)
    result[dim] = concatenation(axes[dim] for axes in pieces)
    return result


@rule("stack")
def stacked(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """Pieces side by side in a new dimension."""
    pieces = [walk.axes(value) for value in given["tensors"]]
    for axes in pieces[1:]:
        for first, axis in zip(pieces[0], axes, strict=True):
            unify(first, axis)
    result = list(pieces[0])
    dim = given.get("dim", 0) % (len(result) + 1)
    return [*result[:dim], fixed(len(pieces), "its positions are stacked by number"), *result[dim:]]


@rule("glu")
def gated(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """Half of a dimension times the gate of the other."""
    x, dim = walk.axes(given["self"]), given.get("dim", -1)
    size = x[dim].size // 2
    result = list(x)
    result[dim] = walk.try_section(x[dim], 0, size)
    unify(result[dim], walk.try_section(x[dim], size, 2 * size))
    return result
