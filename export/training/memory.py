"""What backward reads again is computed again where that is cheaper than keeping it."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx

from edgetune.capture.graph import key_of
from edgetune.export.training.draft import Draft

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.permute.default, aten.clone.default, aten.unsqueeze.default, aten.t.default,
         aten.transpose.int, aten.slice.Tensor)  # fmt: skip
CHEAP = (
    *VIEWS, aten.gelu.default, aten.relu.default, aten.hardtanh.default, aten.sigmoid.default, aten.silu.default,
    aten.tanh.default, aten.hardswish.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor,
    aten.clamp.default, aten.exp.default, aten.neg.default, aten.full_like.default, aten.expand.default,
)  # fmt: skip


def backward_of(draft: Draft) -> set[fx.Node]:
    """Everything that depends on the gradient of the loss by itself, which is a one made from the loss."""
    ones = (aten.full_like.default, aten.ones_like.default)
    found: set[fx.Node] = set([n for n in draft.nodes() if n.target in ones][:1])
    for node in draft.graph.nodes:
        if node.op == "call_function" and any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def recompute(draft: Draft) -> int:
    """Give backward its own copy of what cheap operators make from tensors that are kept anyway. Returns how many.

    Kept is what a backward operator reads and a forward one gives. Through cheap operators, a kept tensor goes back
    to what it was made from; it is made again where that needs nothing more to be kept, or something smaller.
    """
    backward = backward_of(draft)
    kept = {s for n in backward for s in n.all_input_nodes if s not in backward and s.op == "call_function"}
    wanted = Counter(leaf for node in kept for leaf in _leaves(node, kept - {node}) or ())
    copies: dict[fx.Node, fx.Node] = {}
    for node in reversed(draft.nodes()):
        if node not in kept or not isinstance(node.meta.get("val"), Tensor):
            continue
        leaves = _leaves(node, kept - {node})
        shared = node.target in VIEWS or any(wanted[leaf] > 1 for leaf in leaves or ())
        if leaves is None or sum(map(bytes_of, leaves)) > bytes_of(node) * (9 if shared else 1) // 8:
            continue
        users = [user for user in node.users if user in backward]
        places = {node: place for place, node in enumerate(draft.graph.nodes)}
        with draft.before(min(users, key=places.__getitem__)):
            copy = _again(draft, node, (kept | leaves) - {node})
        for user in users:
            user.replace_input_with(node, copy)
        copies[node] = copy
        kept.discard(node)
        kept |= leaves
        backward |= {copy}
    backward = backward_of(draft) | _behind(set(copies.values()), kept)
    merge_equal(draft, backward)
    return len(copies)


def _leaves(node: fx.Node, kept: set[fx.Node]) -> set[fx.Node] | None:
    """What would have to be kept to make the node again; `None` where its own operator is not cheap."""
    if not _is_cheap(node):
        return None
    found: set[fx.Node] = set()
    for source in _sources(node):
        if source.op == "placeholder" or source in kept:
            continue
        inner = _leaves(source, kept)
        found |= {source} if inner is None or sum(map(bytes_of, inner)) > bytes_of(source) * 9 // 8 else inner
    return found


def _is_cheap(node: fx.Node) -> bool:
    return node.target in CHEAP or _is_norm(node)


def _sources(node: fx.Node) -> list[fx.Node]:
    """What the node is made from again: a layer norm's output from its input, mean and deviation."""
    if not _is_norm(node):
        return node.all_input_nodes
    norm: fx.Node = node.args[0]  # type: ignore[assignment]
    return [*norm.all_input_nodes, *(u for u in norm.users if u.args[1] in (1, 2))]


def _again(draft: Draft, node: fx.Node, kept: set[fx.Node]) -> fx.Node:
    """The node made once more from what is kept."""

    def made(source: fx.Node) -> fx.Node:
        if source.op == "placeholder" or source in kept or not _is_cheap(source):
            return source
        return _again(draft, source, kept)

    if _is_norm(node):
        return _normalized(draft, node, made)
    args, kwargs = fx.map_arg((node.args, node.kwargs), made)
    return draft.call(node.target, *args, **kwargs)


def _behind(nodes: set[fx.Node], kept: set[fx.Node]) -> set[fx.Node]:
    """The nodes and what they are made of, back to what is kept."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found and node not in kept and node.op == "call_function" and node.target in CHEAP:
            found.add(node)
            todo += node.all_input_nodes
    return found


def _is_norm(node: fx.Node) -> bool:
    """Whether the node is a layer norm's output, with its mean and deviation in use beside it."""
    if node.target is not operator.getitem or node.args[1] != 0:
        return False
    norm: fx.Node = node.args[0]  # type: ignore[assignment]
    return norm.target is aten.native_layer_norm.default and {1, 2} <= {u.args[1] for u in norm.users}


def _normalized(draft: Draft, node: fx.Node, made: Any) -> fx.Node:
    norm: fx.Node = node.args[0]  # type: ignore[assignment]
    mean, rate = (next(u for u in norm.users if u.args[1] == place) for place in (1, 2))
    weight, bias = norm.args[2:4]
    y = draft.call(aten.mul.Tensor, draft.call(aten.sub.Tensor, made(norm.args[0]), mean), rate)
    y = y if weight is None else draft.call(aten.mul.Tensor, y, weight)
    return y if bias is None else draft.call(aten.add.Tensor, y, bias)


def bytes_of(node: Any) -> int:
    """Size of the tensor that the node gives."""
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def merge_equal(draft: Draft, nodes: set[fx.Node] | None = None) -> None:
    """Compute once what is computed twice (of `nodes`, if given): every layer converts the same mask."""
    seen: dict[Any, fx.Node] = {}
    for node in draft.nodes():
        key = key_of(node) if nodes is None or node in nodes else None
        if key is None:
            continue
        if key in seen:
            draft.replace(node, seen[key])
        else:
            seen[key] = node


def sink_views(draft: Draft) -> None:
    """Give every reader of a view its own: then only what is viewed has to be kept, once."""
    for node in reversed(draft.nodes()):
        if node.target not in VIEWS or len(node.users) < 2:
            continue
        for user in list(node.users)[1:]:
            if user.op == "output":
                continue
            with draft.before(user):
                copy = draft.call(node.target, *node.args, **node.kwargs)
            user.replace_input_with(node, copy)
