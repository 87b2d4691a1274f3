"""Rewrite layers into several operators: convolutions, pooling and norms that pass or receive a gradient."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from edgetune.export.training import conv
from edgetune.export.training.draft import Draft, shape_of

aten = torch.ops.aten


def _frozen(draft: Draft, node: Any) -> bool:
    return node is None or draft.frozen(node) is not None


def _conv_settings(args: list[Any]) -> tuple[list[int], list[int], list[int], int]:
    """Stride, padding, dilation and groups, for two dimensions."""
    stride, padding, dilation, _, _, groups = args[:6]
    if len(stride) == 1:
        return [1, *stride], [0, *padding], [1, *dilation], groups
    return list(stride), list(padding), list(dilation), groups


def _add_height(value: Tensor) -> Tensor:
    return value.unsqueeze(2) if value.dim() == 3 else value


def _convolution(draft: Draft, node: fx.Node) -> fx.Node | None:
    """With a frozen weight a convolution, a trainable bias added after it; else a product of its windows."""
    x, weight, bias = node.args[:3]
    rest: list[Any] = list(node.args[3:])
    if _frozen(draft, weight) and _frozen(draft, bias):
        return None
    result: fx.Node
    if _frozen(draft, weight):
        result = draft.call(node.target, x, weight, None, *rest)
    elif rest[3] or len(rest[0]) > 2:  # transposed, or three dimensions: portable kernels
        return None
    else:
        settings, shape = _conv_settings(rest), shape_of(node)
        result = draft.inline(
            lambda x, w: conv.convolve(_add_height(x), _add_height(w), *settings).view(shape),
            _as_node(x),
            _as_node(weight),
        )
    if bias is None:
        return result
    column = [1, -1, *([1] * (len(shape_of(node)) - 2))]
    return draft.inline(lambda y, b: y + b.view(column), result, bias)  # type: ignore[arg-type]


def _convolution_backward(draft: Draft, node: fx.Node) -> None:
    gradient, x, weight = map(_as_node, node.args[:3])
    rest: list[Any] = list(node.args[4:])
    if rest[3] or len(rest[0]) > 2:
        return
    settings, size, kernel_shape = _conv_settings(rest), shape_of(x), shape_of(weight)
    if len(size) == 3:
        size, kernel_shape = [*size[:2], 1, size[2]], [*kernel_shape[:2], 1, kernel_shape[2]]
    for user in list(node.users):
        which = user.args[1]
        if which == 0 and draft.frozen(weight) is not None:
            new = _through_frozen(draft, gradient, weight, size, kernel_shape, settings)
        elif which == 0:
            new = draft.inline(
                lambda g, w: conv.input_gradient(_add_height(g), _add_height(w), size[2:], *settings), gradient, weight
            )
        elif which == 1:
            new = draft.inline(
                lambda g, x: conv.weight_gradient(_add_height(g), _add_height(x), kernel_shape, *settings), gradient, x
            )
        else:
            new = draft.inline(lambda g: g.sum([0, *range(2, g.dim())]), gradient)
        if shape_of(new) != shape_of(user):
            new = draft.call(aten.view.default, new, shape_of(user))
        draft.replace(user, new)


def _through_frozen(
    draft: Draft, gradient: fx.Node, weight: fx.Node, size: list[int], kernel: list[int], settings: tuple[Any, ...]
) -> fx.Node:
    """The input's gradient as a convolution with a constant weight, the frozen one flipped."""
    stride, padding, dilation, groups = settings
    value = draft.frozen(weight)
    assert value is not None
    flipped = draft.constant(("flipped", weight), lambda: conv.flip_weight(_add_height(value), groups).contiguous())
    reach = [d * (k - 1) for d, k in zip(dilation, kernel[2:], strict=True)]
    if stride == [1, 1] and len(shape_of(gradient)) == 4:
        back = [r - p for r, p in zip(reach, padding, strict=True)]
        if min(back) >= 0:
            return draft.call(
                aten.convolution.default, gradient, flipped, None, [1, 1], back, dilation, False, [0, 0], groups
            )
    wide = draft.inline(
        lambda g: conv.dilate(_add_height(g), size[2:], kernel[2:], stride, padding, dilation), gradient
    )
    return draft.call(aten.convolution.default, wide, flipped, None, [1, 1], [0, 0], dilation, False, [0, 0], groups)


def _batch_norm(draft: Draft, node: fx.Node) -> None:
    """Frozen statistics: a scale and a shift, folded into the convolution before it if that is frozen too."""
    x, weight, bias, mean, variance, _, eps = node.args
    (user,) = [u for u in node.users if u.args[1] == 0]
    if not (_frozen(draft, mean) and _frozen(draft, variance)):
        return
    column = [1, -1, *([1] * (len(shape_of(x)) - 2))]
    held = [draft.frozen(_as_node(n)) if n is not None else None for n in (weight, bias, mean, variance)]
    mean_value, variance_value = held[2], held[3]
    assert mean_value is not None
    assert variance_value is not None
    if _frozen(draft, weight) and _frozen(draft, bias):
        merged = _into_convolution(draft, node, _as_node(x), held, float(eps))  # type: ignore[arg-type]
        if merged is not None:
            draft.replace(user, merged)
            return

    def rate() -> Tensor:
        return torch.rsqrt(variance_value + float(eps)).view(column)  # type: ignore[arg-type]

    scale = draft.constant(("bn scale", node), rate)
    shift = draft.constant(("bn shift", node), lambda: -mean_value.view(column) * rate())
    y = draft.call(aten.add.Tensor, draft.call(aten.mul.Tensor, x, scale), shift)
    for operation, factor in ((aten.mul.Tensor, weight), (aten.add.Tensor, bias)):
        if factor is not None:
            y = draft.call(operation, y, draft.call(aten.view.default, factor, [shape_of(factor)[0], *column[2:]]))
    draft.replace(user, y)


def _into_convolution(draft: Draft, node: fx.Node, x: fx.Node, held: list[Tensor | None], eps: float) -> fx.Node | None:
    weight, bias, mean, variance = held
    if x.target is not aten.convolution.default or x.args[6] or len(x.users) > 1:
        return None
    kernel, before = draft.frozen(_as_node(x.args[1])), None if x.args[2] is None else draft.frozen(_as_node(x.args[2]))
    if kernel is None or (before is None and x.args[2] is not None):
        return None
    assert mean is not None
    assert variance is not None

    def scale() -> Tensor:
        rate = torch.rsqrt(variance + eps)
        return rate if weight is None else rate * weight

    def shift() -> Tensor:
        moved = (0.0 if before is None else before) - mean
        return moved * scale() + (0.0 if bias is None else bias)

    kernel_node = draft.constant(("bn kernel", node), lambda: kernel * scale().view(-1, *([1] * (kernel.dim() - 1))))
    bias_node = draft.constant(("bn bias", node), shift)
    return draft.call(x.target, x.args[0], kernel_node, bias_node, *x.args[3:])


def _max_pool_backward(draft: Draft, node: fx.Node) -> fx.Node:
    gradient, x, kernel, stride, padding, dilation = node.args[:6]
    settings = [_pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation)]
    return draft.inline(lambda g, x: conv.max_pool_gradient(g, x, *settings), _as_node(gradient), _as_node(x))


def _max_pool(draft: Draft, node: fx.Node) -> None:
    """Without its indices, which this backward does not need."""
    users = list(node.users)
    if all(user.target is operator.getitem and user.args[1] == 0 for user in users):
        plain = draft.call(aten.max_pool2d.default, *_full_arguments(node))
        for user in users:
            draft.replace(user, plain)


def _max_pool_plain(draft: Draft, node: fx.Node) -> fx.Node:
    """XNNPACK's partitioner reads optional arguments."""
    return draft.call(node.target, *_full_arguments(node))


def _full_arguments(node: fx.Node) -> list[Any]:
    given: list[Any] = [*node.args, *[None, 0, 1, False][len(node.args) - 2 :]]
    x, kernel, stride, padding, dilation, ceil = given
    return [x, _pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation), ceil]


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value) * (2 if len(value) == 1 else 1)


def _as_node(node: Any) -> fx.Node:
    assert isinstance(node, fx.Node)
    return node


def fuse_padding(program: ExportedProgram) -> None:
    """Fold zero padding into the convolution after it, if it is symmetric."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target not in (aten.conv1d.default, aten.conv2d.default, aten.convolution.default):
            continue
        source = node.args[0]
        pads = _zero_pads(source)
        sides = len(shape_of(node)) - 2
        if pads is None or len(pads) != 2 * sides or pads[0::2] != pads[1::2] or min(pads) < 0:
            continue
        args = [*node.args, *[None, [1] * sides, [0] * sides][max(len(node.args) - 2, 0) :]]
        own = [args[4]] * sides if isinstance(args[4], int) else list(args[4])
        args[0], args[4] = source.args[0], [a + b for a, b in zip(own, reversed(pads[0::2]), strict=True)]
        node.args = tuple(args)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _zero_pads(node: Any) -> list[int] | None:
    if not isinstance(node, fx.Node) or node.target not in (aten.pad.default, aten.constant_pad_nd.default):
        return None
    rest = list(node.args[2:])
    if node.target is aten.pad.default and rest and rest.pop(0) != "constant":
        return None
    return list(node.args[1]) if not rest or not rest[0] else None  # type: ignore[arg-type]


def _pad(draft: Draft, node: fx.Node) -> fx.Node | None:
    """Negative padding, as in the backward of padding, is a slice."""
    pads: list[int] = list(node.args[1])  # type: ignore[arg-type]
    if min(pads) >= 0:
        return None
    result: fx.Node = node.args[0]  # type: ignore[assignment]
    rank = len(shape_of(result))
    for n in range(len(pads) // 2):
        before, after = pads[2 * n : 2 * n + 2]
        size = shape_of(result)[rank - 1 - n]
        if min(before, after) < 0:
            result = draft.call(aten.slice.Tensor, result, rank - 1 - n, max(-before, 0), size + min(after, 0))
    wider = [max(p, 0) for p in pads]
    return draft.call(node.target, result, wider, *node.args[2:]) if any(wider) else result


# in every graph, backward operators come after the forward operators that they use
RULES: dict[Any, Callable[[Draft, fx.Node], fx.Node | None]] = {
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.max_pool2d.default: _max_pool_plain,
    aten.constant_pad_nd.default: _pad,
}
