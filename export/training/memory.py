"""Recompute activations in the backward pass if that is cheaper than saving them; merge equal operators."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx

from edgetune.capture.graph import key_of
from edgetune.export.training.draft import Draft, reach

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.permute.default, aten.clone.default, aten.unsqueeze.default, aten.t.default,
         aten.transpose.int, aten.slice.Tensor)  # fmt: skip
CHEAP = (
    *VIEWS, aten.gelu.default, aten.relu.default, aten.hardtanh.default, aten.sigmoid.default, aten.silu.default,
    aten.tanh.default, aten.hardswish.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor,
    aten.clamp.default, aten.exp.default, aten.neg.default, aten.full_like.default, aten.expand.default,
)  # fmt: skip


def backward_of(draft: Draft) -> set[fx.Node]:
    """The operators that depend on the gradient of the loss with respect to itself, a tensor of one."""
    ones = (aten.full_like.default, aten.ones_like.default)
    backward: set[fx.Node] = set([n for n in draft.nodes() if n.target in ones][:1])
    for node in draft.graph.nodes:
        if node.op == "call_function" and any(source in backward for source in node.all_input_nodes):
            backward.add(node)
    return backward


def recompute(draft: Draft) -> int:
    """Recompute the results of cheap operators in backward. Returns how many.

    Saved for backward are the results of forward operators that backward reads. One is recomputed if the tensors that
    cheap operators need for it are saved anyway, or are smaller.
    """
    backward = backward_of(draft)
    saved = {s for n in backward for s in n.all_input_nodes if s not in backward and s.op == "call_function"}
    wanted = Counter(leaf for node in saved for leaf in _leaves(node, saved - {node}) or ())
    copies: dict[fx.Node, fx.Node] = {}
    for node in reversed(draft.nodes()):
        if node not in saved or not isinstance(node.meta.get("val"), Tensor):
            continue
        leaves = _leaves(node, saved - {node})
        shared = node.target in VIEWS or any(wanted[leaf] > 1 for leaf in leaves or ())
        if leaves is None or sum(map(bytes_of, leaves)) > bytes_of(node) * (9 if shared else 1) // 8:
            continue
        users = [user for user in node.users if user in backward]
        positions = {node: place for place, node in enumerate(draft.graph.nodes)}
        with draft.inserting_before(min(users, key=positions.__getitem__)):
            copy = _rebuild(draft, node, (saved | leaves) - {node})
        for user in users:
            user.replace_input_with(node, copy)
        copies[node] = copy
        saved.discard(node)
        saved |= leaves
        backward |= {copy}

    def is_recomputed(node: fx.Node) -> bool:
        return node not in saved and node.op == "call_function" and node.target in CHEAP

    recomputed = reach(filter(is_recomputed, copies.values()), lambda node: filter(is_recomputed, node.all_input_nodes))
    merge_equal(draft, backward_of(draft) | recomputed)
    return len(copies)


def _leaves(node: fx.Node, saved: set[fx.Node]) -> set[fx.Node] | None:
    """The tensors to save for recomputing the node; `None` if its operator is not cheap."""
    if not _is_cheap(node):
        return None
    leaves: set[fx.Node] = set()
    for source in _sources(node):
        if source.op == "placeholder" or source in saved:
            continue
        inner = _leaves(source, saved)
        leaves |= {source} if inner is None or sum(map(bytes_of, inner)) > bytes_of(source) * 9 // 8 else inner
    return leaves


def _is_cheap(node: fx.Node) -> bool:
    return node.target in CHEAP or _is_norm(node)


def _sources(node: fx.Node) -> list[fx.Node]:
    """The inputs for recomputing the node: for a layer norm its input, mean and deviation."""
    if not _is_norm(node):
        return node.all_input_nodes
    norm: fx.Node = node.args[0]  # type: ignore[assignment]
    return [*norm.all_input_nodes, *(u for u in norm.users if u.args[1] in (1, 2))]


def _rebuild(draft: Draft, node: fx.Node, saved: set[fx.Node]) -> fx.Node:
    """Add the node again, computed from saved tensors."""

    def rebuild_source(source: fx.Node) -> fx.Node:
        if source.op == "placeholder" or source in saved or not _is_cheap(source):
            return source
        return _rebuild(draft, source, saved)

    if _is_norm(node):
        return _rebuild_norm(draft, node, rebuild_source)
    args, kwargs = fx.map_arg((node.args, node.kwargs), rebuild_source)
    return draft.call(node.target, *args, **kwargs)


def _is_norm(node: fx.Node) -> bool:
    """Whether the node is the output of a layer norm whose mean and deviation are also used."""
    if node.target is not operator.getitem or node.args[1] != 0:
        return False
    norm: fx.Node = node.args[0]  # type: ignore[assignment]
    return norm.target is aten.native_layer_norm.default and {1, 2} <= {u.args[1] for u in norm.users}


def _rebuild_norm(draft: Draft, node: fx.Node, rebuild_source: Any) -> fx.Node:
    norm: fx.Node = node.args[0]  # type: ignore[assignment]
    mean, rate = (next(u for u in norm.users if u.args[1] == place) for place in (1, 2))
    weight, bias = norm.args[2:4]
    y = draft.call(aten.mul.Tensor, draft.call(aten.sub.Tensor, rebuild_source(norm.args[0]), mean), rate)
    y = y if weight is None else draft.call(aten.mul.Tensor, y, weight)
    return y if bias is None else draft.call(aten.add.Tensor, y, bias)


def bytes_of(node: Any) -> int:
    """Bytes of the node's tensor."""
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def merge_equal(draft: Draft, nodes: set[fx.Node] | None = None) -> None:
    """Merge equal operators (of `nodes`, if given), such as each layer's conversion of the same mask."""
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
    """Give every reader of a view a copy of it, so that only the viewed tensor has to be saved."""
    for node in reversed(draft.nodes()):
        if node.target not in VIEWS or len(node.users) < 2:
            continue
        for user in list(node.users)[1:]:
            if user.op == "output":
                continue
            with draft.inserting_before(user):
                copy = draft.call(node.target, *node.args, **node.kwargs)
            user.replace_input_with(node, copy)
