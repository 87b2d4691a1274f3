"""Axes of tensors as expressions over leaves: what is one axis here may be heads times head width, or a sum, there.

Two dimensions whose positions belong together get one axis (`unify`). A view splits an axis into factors, a slice into
summands; so in the end each leaf is what can be cut by itself: channels, hidden units, heads, the width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass(eq=False)
class UnitAxis:
    """Positions along a dimension: a leaf, or the product (first factor outermost) or the sum of `parts`.

    `blocked`: why the leaf cannot be cut. `merged`: the axis that this one turned out to be.
    """

    size: int
    kind: Literal["leaf", "product", "sum"] = "leaf"
    parts: tuple[UnitAxis, ...] = ()
    blocked: dict[str, None] = field(default_factory=dict)
    merged: UnitAxis | None = None

    def root(self) -> UnitAxis:
        """The axis that this one is."""
        axis = self
        while axis.merged is not None:
            axis = axis.merged
        while self.merged is not None and self.merged is not axis:  # shorten the way
            self.merged, self = axis, self.merged
        return axis

    def leaves(self) -> list[UnitAxis]:
        """The leaves of more than one position, in order, each once."""
        ordered: dict[UnitAxis, None] = {}
        waiting = [self]
        while waiting:
            axis = waiting.pop().root()
            if axis.kind == "leaf" and axis.size > 1:
                ordered[axis] = None
            waiting += reversed(axis.parts)
        return list(ordered)

    def block(self, reason: str) -> None:
        """None of the positions can be cut by themselves."""
        for leaf in self.leaves():
            leaf.blocked.setdefault(reason)

    def split(self, kind: Literal["product", "sum"], parts: Sequence[UnitAxis]) -> None:
        """Make parts of a leaf. They are blocked for the same reasons."""
        for part in parts:
            for reason in self.blocked:
                part.block(reason)
        self.kind, self.parts = kind, tuple(parts)


def product(factors: Iterable[UnitAxis]) -> UnitAxis:
    """The axis of these factors, the first outermost."""
    factors = [axis for axis in factors if axis.size != 1]
    if len(factors) == 1:
        return factors[0]
    return UnitAxis(math.prod(axis.size for axis in factors), "product", tuple(factors)) if factors else UnitAxis(1)


def concatenation(parts: Iterable[UnitAxis]) -> UnitAxis:
    """The axis of these parts, one after the other."""
    parts = [axis for axis in parts if axis.size]
    return parts[0] if len(parts) == 1 else UnitAxis(sum(axis.size for axis in parts), "sum", tuple(parts))


def unify(first: UnitAxis, second: UnitAxis) -> None:
    """Let two axes of one size be the same, position by position; where that has no form, both are blocked."""
    a, b = first.root(), second.root()
    if a is b or a.size != b.size or a.size <= 1:
        if a is not b and a.size != b.size:
            _block_both(a, b, "widths that differ")
        return
    if a.kind != "leaf" and b.kind == "leaf":
        a, b = b, a
    if a.kind == "leaf":
        if a in b.leaves():
            _block_both(a, b, "an axis that is a part of itself")
            return
        for reason in a.blocked:
            b.block(reason)
        a.merged = b
        return
    try:
        if a.kind == b.kind == "product":
            _align(_factors(a), _factors(b), factorize)
        else:
            _align(_summands(a), _summands(b), cut_off)
    except Misaligned:
        _block_both(a, b, "a rearrangement of its positions")
        return
    if a.root() is not b.root():
        a.merged = b


class Misaligned(Exception):
    """An axis has no form in which it can be divided as asked."""


def _block_both(a: UnitAxis, b: UnitAxis, reason: str) -> None:
    a.block(reason)
    b.block(reason)


def _factors(axis: UnitAxis) -> list[UnitAxis]:
    axis = axis.root()
    return [f for part in axis.parts for f in _factors(part)] if axis.kind == "product" else [axis]


def _summands(axis: UnitAxis) -> list[UnitAxis]:
    axis = axis.root()
    return [s for part in axis.parts for s in _summands(part)] if axis.kind == "sum" else [axis]


Divide = Callable[[UnitAxis, int], tuple[UnitAxis, UnitAxis]]


def _align(left: list[UnitAxis], right: list[UnitAxis], divide: Divide) -> None:
    """Unify the parts of two axes from the first on, and divide the larger of two that differ."""
    left, right = left[::-1], right[::-1]
    while left and right:
        x, y = left.pop().root(), right.pop().root()
        if x.size != y.size:
            larger, rest = (x, left) if x.size > y.size else (y, right)
            head, tail = divide(larger, min(x.size, y.size))
            rest.append(tail)
            x, y = head, (y if larger is x else x)
        unify(x, y)


def factorize(axis: UnitAxis, outer: int) -> tuple[UnitAxis, UnitAxis]:
    """The outer factor, of this size, and the inner one. Raises `Misaligned`."""
    axis = axis.root()
    if outer < 1 or axis.size % outer:
        raise Misaligned
    inner = axis.size // outer
    if outer == 1:
        return UnitAxis(1), axis
    if inner == 1:
        return axis, UnitAxis(1)
    if axis.kind == "leaf":
        axis.split("product", (UnitAxis(outer), UnitAxis(inner)))
        return axis.parts[0], axis.parts[1]
    if axis.kind == "product":
        rest = _factors(axis)
        return _take(rest, outer), product(rest)
    parts = _summands(axis)
    if any(part.size % inner for part in parts):
        raise Misaligned
    pairs = [factorize(part, part.size // inner) for part in parts]
    for _, other in pairs[1:]:
        unify(pairs[0][1], other)
    return concatenation(first for first, _ in pairs), pairs[0][1]


def _take(waiting: list[UnitAxis], size: int) -> UnitAxis:
    """Take factors of this size together off the front of a list, the last of them in part. Raises `Misaligned`."""
    taken = list[UnitAxis]()
    while size > 1:
        if not waiting:
            raise Misaligned
        factor = waiting.pop(0).root()
        if factor.kind == "product":
            waiting[:0] = _factors(factor)
            continue
        if size % factor.size:
            factor, tail = factorize(factor, math.gcd(size, factor.size))
            if factor.size == 1:
                raise Misaligned
            waiting.insert(0, tail)
        taken.append(factor)
        size //= factor.size
    return product(taken)


def cut_off(axis: UnitAxis, count: int) -> tuple[UnitAxis, UnitAxis]:
    """The first `count` positions, and those after them. Raises `Misaligned`."""
    axis = axis.root()
    if not 0 <= count <= axis.size:
        raise Misaligned
    if count in (0, axis.size):
        return (UnitAxis(0), axis) if count == 0 else (axis, UnitAxis(0))
    if axis.kind == "leaf":
        axis.split("sum", (UnitAxis(count), UnitAxis(axis.size - count)))
        return axis.parts[0], axis.parts[1]
    if axis.kind == "product":
        outer, *others = _factors(axis)
        inner = product(others)
        if count % inner.size:
            raise Misaligned
        head, tail = cut_off(outer, count // inner.size)
        return product([head, inner]), product([tail, inner])
    head_parts, rest = list[UnitAxis](), _summands(axis)
    while count:
        part = rest.pop(0)
        if part.size > count:
            part, tail = cut_off(part, count)
            rest.insert(0, tail)
        head_parts.append(part)
        count -= part.size
    return concatenation(head_parts), concatenation(rest)


def section(axis: UnitAxis, start: int, stop: int) -> UnitAxis:
    """The positions from `start` to before `stop`. Raises `Misaligned`."""
    return cut_off(cut_off(axis, stop)[0], start)[1]


def regroup(axes: Sequence[UnitAxis], sizes: Sequence[int]) -> list[UnitAxis]:
    """The axes of a view with these sizes; axes of size 1 carry nothing. Raises `Misaligned`."""
    waiting = [factor for axis in axes for factor in _factors(axis) if factor.size != 1]
    return [_take(waiting, size) for size in sizes]


def units_of(axis: UnitAxis, leaf: UnitAxis) -> Tensor:
    """The position on `leaf` of each position of an axis `(size,)`; -1 where it has none.

    Raises `Misaligned` where one position has two.
    """
    axis = axis.root()
    if axis is leaf:
        return torch.arange(axis.size)
    if axis.kind == "leaf":
        return torch.full((axis.size,), -1)
    parts = [units_of(part, leaf) for part in axis.parts]
    if axis.kind == "sum":
        return torch.cat(parts)
    if sum(bool((part >= 0).any()) for part in parts) > 1:
        raise Misaligned
    units = torch.full((1,), -1)
    for part in parts:
        units = torch.maximum(units[:, None], part[None, :]).flatten()
    return units
