"""Lowering without the repeated work: the same program, in less time.

Every pass of executorch traces the whole graph anew, even where the pass only looked at it, and most of XNNPACK's
do so once for each delegate. A retrace by a pass that overrides no hook of the interpreter only computes the
metadata of nodes again; where all of them have it, there is nothing to compute. Each retrace also deep-copies the
history of every node. Both are left out here while a lowering runs, and put back after it. A test holds the result
to the bytes of the stock lowering.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx

_HOOKS = (
    "call_operator", "call_sym", "call_cond", "call_map", "call_while", "call_scan", "call_getitem", "call_delegate",
    "call_submodule", "call_shape", "output", "placeholder", "on_attr", "get_attr", "inputs",
)  # fmt: skip


@contextmanager
def fast_lowering() -> Iterator[None]:
    """Leave needless retraces, copied histories and garbage collection out while the body runs."""
    from executorch.exir import pass_base
    from torch.fx import traceback

    stock_call, stock_source = pass_base._ExportPassBase.call, traceback.NodeSource
    was_enabled = gc.isenabled()
    pass_base._ExportPassBase.call = _call_if_needed(stock_call, pass_base.ExportPass)
    traceback.NodeSource = _short_history(stock_source)  # type: ignore[misc, assignment]
    gc.disable()
    try:
        yield
    finally:
        pass_base._ExportPassBase.call = stock_call
        traceback.NodeSource = stock_source  # type: ignore[misc]
        if was_enabled:
            gc.enable()


def _call_if_needed(stock: Any, base: type) -> Any:
    from torch.fx.passes.infra.pass_base import PassResult

    def call(self: Any, graph_module: fx.GraphModule) -> PassResult:
        hooked = any(getattr(type(self), name, None) is not getattr(base, name, None) for name in _HOOKS)
        if hooked or not _is_complete(graph_module):
            result: PassResult = stock(self, graph_module)
            return result
        return PassResult(graph_module, True)

    return call


def _is_complete(graph_module: fx.GraphModule) -> bool:
    nodes = graph_module.graph.nodes
    return all(
        "val" in node.meta if node.op in ("call_function", "placeholder") else node.op == "output" for node in nodes
    )


def _short_history(stock: type) -> type:
    """A `NodeSource` that shares its parents' history instead of copying it whole for each node and pass."""

    class ShortHistory(stock):  # type: ignore[valid-type, misc]
        def __init__(self, node: fx.Node | None, pass_name: str = "", action: Any = None) -> None:
            super().__init__(None, pass_name, action)
            if node is not None:
                self.node_info = stock.NodeInfo(node.name, str(node.target), id(node.graph))  # type: ignore[attr-defined]
                self.from_node = node.meta.get("from_node", [])

    return ShortHistory
