"""Rewrite operators that XNNPACK does not take into ones that it does; each has a test against autograd.

`decompositions` are the backward of single operators, used while autograd is traced. `rewrite` changes the finished
graph, where trainable operands are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from edgetune.export.training import layers
from edgetune.export.training.conv import HUGE
from edgetune.export.training.draft import Draft, shape_of

aten = torch.ops.aten
_TINY = 1.1e-30


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Decompositions of the backward pass: ours, and executorch's for its core operators."""
    from torch._decomp import core_aten_decompositions

    return {
        **core_aten_decompositions(),
        aten.gelu_backward.default: gelu_backward,
        aten.threshold_backward.default: threshold_backward,
        aten.hardtanh_backward.default: hardtanh_backward,
        aten.hardswish_backward.default: hardswish_backward,
        aten.hardsigmoid_backward.default: hardsigmoid_backward,
        aten._softmax_backward_data.default: softmax_backward,
        aten.sigmoid_backward.default: lambda g, y: g * (y * (1.0 - y)),
        aten.tanh_backward.default: lambda g, y: g * (1.0 - y * y),
        aten.silu_backward.default: silu_backward,
    }


def _above(x: Tensor) -> Tensor:
    """1 where `x > 0`, else 0, without a comparison: numbers below 1e-38 count in part."""
    return torch.clamp(x * HUGE, 0.0, 1.0)


def gelu_backward(gradient: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    """`g * (Phi(x) + x phi(x))`, where Phi(x) is gelu(x) / x: XNNPACK has gelu, but not erf."""
    if approximate == "tanh":
        scale, cubic = math.sqrt(2 / math.pi), 0.044715
        square = x * x
        t = torch.tanh(x * (scale + scale * cubic * square))
        inner = scale + 3 * scale * cubic * square
        return gradient * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner)
    phi = (torch.nn.functional.gelu(x) + 0.5 * _TINY) / (x + _TINY)
    return gradient * (phi + x * torch.exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi)))


def threshold_backward(gradient: Tensor, y: Tensor, threshold: float) -> Tensor:
    """`g` where `y > threshold`, which is 0 for relu."""
    return gradient * _above(y - threshold if threshold else y)


def hardtanh_backward(gradient: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """`g` where `low < x < high`."""
    return gradient * (_above(x - low if low else x) * _above(high - x))


def hardswish_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """0 up to -3, 1 from 3, between them `x / 3 + 1 / 2`."""
    inside = _above(x + 3.0) * _above(3.0 - x)
    return gradient * (inside * (x * (1 / 3) + 0.5) + (1.0 - _above(3.0 - x)))


def hardsigmoid_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """1 / 6 between -3 and 3."""
    return gradient * (_above(x + 3.0) * _above(3.0 - x) * (1 / 6))


def silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """`g * s * (1 + x (1 - s))` with `s = sigmoid(x)`."""
    s = torch.sigmoid(x)
    return gradient * (s * (1.0 + x * (1.0 - s)))


def softmax_backward(gradient: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """`y * (g - sum(g * y))`."""
    product = gradient * y
    return product - y * product.sum(dim, keepdim=True)


def rewrite(draft: Draft) -> None:
    """Apply the rules to every operator: first those that give several operators, then those for single ones."""
    for rules in (layers.RULES, RULES):
        for node in draft.nodes():
            rule = rules.get(node.target)
            if rule is None:
                continue
            with draft.inserting_before(node):
                new = rule(draft, node)
            if new is not None and new is not node:
                draft.replace(node, new)
        draft.graph.eliminate_dead_code()


def _view(draft: Draft, node: fx.Node, shape: list[int]) -> fx.Node:
    return node if shape_of(node) == shape else draft.call(aten.view.default, _contiguous(draft, node), shape)


def _contiguous(draft: Draft, node: fx.Node) -> fx.Node:
    if node.meta["val"].is_contiguous():
        return node
    return draft.call(aten.clone.default, node, memory_format=torch.contiguous_format)


def _remove(draft: Draft, node: fx.Node) -> fx.Node:
    return node.args[0]  # type: ignore[return-value]


def _replace_by_view(draft: Draft, node: fx.Node) -> fx.Node:
    return _view(draft, node.args[0], shape_of(node))  # type: ignore[arg-type]


def _expand(draft: Draft, node: fx.Node) -> fx.Node | None:
    """Remove an expand that changes nothing, or whose readers broadcast anyway."""
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    if shape_of(source) == shape_of(node):
        return source
    for user in list(node.users):
        if _broadcasts(user, node, source):
            user.replace_input_with(node, source)
    if node.users:
        _scale_first(draft, node, source)
    return None if node.users else source


def _scale_first(draft: Draft, node: fx.Node, source: fx.Node) -> None:
    """Scale before the expand instead of after it."""
    for user in list(node.users):
        numbers = len(user.args) == 2 and user.args[0] is node and isinstance(user.args[1], (int, float))
        if numbers and user.target in (aten.div.Scalar, aten.mul.Scalar, aten.div.Tensor, aten.mul.Tensor):
            scaled = draft.call(user.target, source, user.args[1])
            draft.replace(user, _contiguous(draft, draft.call(node.target, scaled, *node.args[1:])))


def _full(draft: Draft, node: fx.Node) -> fx.Node | None:
    """A constant tensor; of one element if all readers broadcast it."""
    shape, value = shape_of(node), node.args[1]
    if not shape or node.meta["val"].dtype != torch.float32 or not isinstance(value, (int, float)):
        return None  # a scalar may be the gradient of the loss
    if all(_broadcasts(user, node, None) for user in node.users):
        shape = [1]
    return draft.ones(*shape, value=float(value))


def _broadcasts(user: fx.Node, node: fx.Node, source: fx.Node | None) -> bool:
    """Whether the reader would broadcast `source`, or one number, to the node's shape."""
    others = [a for a in user.args if isinstance(a, fx.Node) and a is not node]
    if user.target not in ELEMENTWISE or len(others) != 1 or len(user.args) != 2:
        return False
    own = torch.Size([1]) if source is None else source.meta["val"].shape
    other = others[0].meta["val"].shape
    together = torch.broadcast_shapes(own, other)  # type: ignore[no-untyped-call]
    return together == user.meta["val"].shape and (source is None or len(own) >= len(other))  # type: ignore[no-any-return]


def _frozen_weight(draft: Draft, right: fx.Node) -> fx.Node | None:
    """The frozen weight `(out, in)` whose transpose `right` is; it may be quantized."""
    if right.target not in (aten.permute.default, aten.t.default):
        return None
    weight: Any = right.args[0]
    stored = "dequantize" in str(weight.target) and all(draft.frozen(s) is not None for s in weight.all_input_nodes)
    return weight if stored or draft.frozen(weight) is not None else None


def _linear(draft: Draft, left: fx.Node, weight: fx.Node, bias: fx.Node | None, shape: list[int]) -> fx.Node:
    """A linear with a constant weight, without the views to two dimensions around it."""
    source: Any = left.args[0] if left.target is aten.view.default else left
    straight = shape_of(source)[-1] == shape_of(weight)[1]
    product = draft.call(aten.linear.default, source if straight else left, weight, *([bias] if bias else []))
    return _view(draft, product, shape)


def _product(draft: Draft, left: fx.Node, right: fx.Node) -> fx.Node:
    """`left @ right`: a linear if `right` is a frozen weight, else a batched product, which packs no operand."""
    weight = _frozen_weight(draft, right)
    if weight is not None:
        return _linear(draft, left, weight, None, [shape_of(left)[0], shape_of(right)[1]])
    rows, columns = shape_of(left)[0], shape_of(right)[1]
    left, right = (_view(draft, n, [1, *shape_of(n)]) for n in (left, right))
    return _view(draft, draft.call(aten.bmm.default, left, right), [rows, columns])


def _mm(draft: Draft, node: fx.Node) -> fx.Node:
    return _product(draft, node.args[0], node.args[1])  # type: ignore[arg-type]


def _addmm(draft: Draft, node: fx.Node) -> fx.Node:
    bias, left, right = node.args[:3]
    weight = _frozen_weight(draft, right)  # type: ignore[arg-type]
    if weight is not None and draft.frozen(bias) is not None:  # type: ignore[arg-type]
        return _linear(draft, left, weight, bias, shape_of(node))  # type: ignore[arg-type]
    return draft.call(aten.add.Tensor, _product(draft, left, right), bias)  # type: ignore[arg-type]


def _view_of_view(draft: Draft, node: fx.Node) -> fx.Node | None:
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    while source.target is aten.view.default:
        source = source.args[0]  # type: ignore[assignment]
    if shape_of(source) == shape_of(node):
        return source
    return None if source is node.args[0] else draft.call(aten.view.default, source, shape_of(node))


def _sum(draft: Draft, node: fx.Node) -> fx.Node | None:
    """A sum as products with ones."""
    source, dims = node.args[:2]
    return _reduce(draft, node, source, dims, 1.0)  # type: ignore[arg-type]


def _mean(draft: Draft, node: fx.Node) -> fx.Node | None:
    source: Any = node.args[0]
    dims: Any = node.args[1]
    shape = shape_of(source)
    count = math.prod(shape[d] for d in (dims or range(len(shape))))
    return _reduce(draft, node, source, dims, 1.0 / count)  # type: ignore[arg-type]


def _reduce(draft: Draft, node: fx.Node, source: fx.Node, dims: Any, weight: float) -> fx.Node | None:
    """One product for each run of adjacent dimensions, the last first."""
    shape = shape_of(source)
    left = sorted(d % len(shape) for d in dims) if dims else list(range(len(shape)))
    if source.meta["val"].dtype != torch.float32:
        return None
    total = source
    while left:
        first = last = left.pop()
        while left and left[-1] == first - 1:
            first = left.pop()
        outer, count, inner = (math.prod(part) for part in (shape[:first], shape[first : last + 1], shape[last + 1 :]))
        if inner == 1:
            ones = draft.ones(1, count, 1, value=weight)
            total = draft.call(aten.bmm.default, _view(draft, total, [1, outer, count]), ones)
        else:
            ones = draft.ones(outer, 1, count, value=weight)
            total = draft.call(aten.bmm.default, ones, _view(draft, total, [outer, count, inner]))
        shape[first : last + 1] = [1] * (last + 1 - first)
        weight = 1.0
    return _view(draft, total, shape_of(node))


ELEMENTWISE = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
RULES: dict[Any, Callable[[Draft, fx.Node], fx.Node | None]] = {
    aten.alias.default: _remove,
    aten.detach.default: _remove,
    aten.lift_fresh_copy.default: _remove,
    aten.squeeze.dims: _replace_by_view,
    aten.squeeze.dim: _replace_by_view,
    aten.unsqueeze.default: _replace_by_view,
    aten.expand.default: _expand,
    aten.full_like.default: _full,
    aten.full.default: _full,
    aten.ones_like.default: lambda draft, node: draft.ones(*shape_of(node)) if shape_of(node) else None,
    aten.view.default: _view_of_view,
    aten._unsafe_view.default: _replace_by_view,
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.sum.dim_IntList: _sum,
    aten.mean.dim: _mean,
}
