"""Keep the values of the nodes that a pass of executorch leaves as they were.

A pass of executorch replays the whole graph: it runs each operator on fake tensors, although most are called with what
they were called with before. A value here is a fake tensor, or a size that is a symbol. Each node keeps what it was
called with when its value was computed: its arguments in the graph say nothing of that, since a pass may change them
before it replays the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_iter, tree_map_only

_CALL = "edgetune_call"  # in a node's meta: the operator and the values that its own value was computed from


@contextmanager
def keep_values() -> Iterator[None]:
    """Inside, a pass runs only those operators whose target or whose arguments it changed."""
    from executorch.exir import pass_base

    base: Any = pass_base._ExportPassBase
    interpreter: Any = base.ExportInterpreter
    stock_fx, stock_run = base._fx, interpreter.run_node

    def run_node(self: Any, node: fx.Node) -> Any:
        self.callback.replayed_node = node
        return stock_run(self, node)

    def record(self: Any, kind: str, target: Any, args: Any, kwargs: Any, meta: Any) -> Any:
        node: fx.Node | None = getattr(self, "replayed_node", None)
        if kind != "call_function" or node is None:
            return stock_fx(self, kind, target, args, kwargs, meta)
        call = _operator(target), tree_map_only(pass_base.ProxyValue, lambda value: value.data, (args, kwargs))
        before, call_before = node.meta.get("val"), node.meta.get(_CALL)
        is_kept = "val" in node.meta and _is_of_mode(before, self.fake_tensor_mode)
        if is_kept and call_before is not None and _is_same(call, call_before):
            compute, self.interpreter = self.interpreter, _FixedValue(before)
            try:
                result = stock_fx(self, kind, target, args, kwargs, meta)
            finally:
                self.interpreter = compute
        else:
            result = stock_fx(self, kind, target, args, kwargs, meta)
            if is_kept and _has_form_of(result.data, before):  # so that what reads it is unchanged as well
                result.data = result.node.meta["val"] = before
        result.node.meta[_CALL] = call
        return result

    base._fx, interpreter.run_node = record, run_node
    try:
        yield
    finally:
        base._fx, interpreter.run_node = stock_fx, stock_run


class _FixedValue:
    """An interpreter of one operator, whose value is given."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def call_function(self, *_: Any) -> Any:
        """The value."""
        return self.value


def _operator(target: Any) -> Any:
    """The operator behind one of executorch's edge dialect."""
    return target if isinstance(target, torch._ops.OpOverload) else getattr(target, "_op", target)


def _is_same(given: Any, before: Any) -> bool:
    """Whether two calls are of the same operator with the same values, and equal constants."""
    if isinstance(before, (list, tuple)):
        return isinstance(given, (list, tuple)) and len(given) == len(before) and all(map(_is_same, given, before))
    if isinstance(before, dict):
        return (
            isinstance(given, dict)
            and given.keys() == before.keys()
            and all(_is_same(given[key], value) for key, value in before.items())
        )
    if isinstance(before, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return given is before
    return given is before or (type(given) is type(before) and bool(given == before))


def _is_of_mode(value: Any, mode: Any) -> bool:
    return all(
        type(leaf) is torch.SymInt or (type(leaf) is FakeTensor and leaf.fake_mode is mode and leaf.constant is None)
        for leaf in tree_iter(value)
    )


def _has_form_of(value: Any, before: Any) -> bool:
    """Whether nothing that is computed from them could differ: a tensor's form, or a size."""
    if type(value) is not type(before):
        return False
    if isinstance(value, torch.SymInt):
        return bool(value.node.expr == before.node.expr)
    return isinstance(value, FakeTensor) and _form(value) == _form(before) and value.fake_mode is before.fake_mode


def _form(tensor: FakeTensor) -> tuple[Any, ...]:
    sizes = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    plain = [size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes]
    return (plain, tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad, tensor.constant is None)
