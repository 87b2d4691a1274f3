"""Speed up lowering by skipping repeated work; the program is the same to the byte (a test compares them).

Every pass of executorch retraces the whole graph, and most of XNNPACK's do so once for each delegate. A retrace by a
pass that overrides no hook of the interpreter only recomputes the nodes' metadata, and deep-copies the history of
every node. After each pass the graph is written and compiled as Python code, which is hardly ever run. Two of three
decompositions find nothing to decompose, and each lists all operators of torch that it could preserve and makes thirty
kernels for each of them, the same as the one before. Inside these context managers all of this is skipped or reused.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx
from torch.export import ExportedProgram

from edgetune.export.replayed_values import keep_values
from edgetune.export.shape_rules import infer_shapes

_HOOKS = (
    "call_operator", "call_sym", "call_cond", "call_map", "call_while", "call_scan", "call_getitem", "call_delegate",
    "call_submodule", "call_shape", "output", "placeholder", "on_attr", "get_attr", "inputs",
)  # fmt: skip
# Passes that replace only these operators
_REPLACED: dict[str, Callable[[Any], bool]] = {
    "DimOrderOpsRevertPass": lambda operator: "dim_order" in str(operator),
    "NormalizeTransposePass": lambda operator: operator is torch.ops.aten.t.default,
    "ReplaceBrokenOpsWithFunctionalOpsPass": lambda operator: bool(getattr(operator, "is_view", False)),
}


@contextmanager
def fast_lowering() -> Iterator[None]:
    """Inside, skip needless retraces and decompositions, and copied histories."""
    from executorch.exir import pass_base
    from executorch.exir.passes import quant_fusion_pass
    from torch.fx import traceback

    stock_call, stock_source = pass_base._ExportPassBase.call, traceback.NodeSource
    stock_decompose: Any = ExportedProgram.run_decompositions
    stock_compile: Any = fx.GraphModule.recompile
    stock_fusion = quant_fusion_pass.QuantFusionPass.call
    pass_base._ExportPassBase.call = _retrace_if_needed(stock_call, pass_base.ExportPass)
    traceback.NodeSource = _short_history(stock_source)  # type: ignore[misc, assignment]
    ExportedProgram.run_decompositions = _decompose_if_needed(stock_decompose)  # type: ignore[method-assign]
    fx.GraphModule.recompile = _compile_if_called(stock_compile)  # type: ignore[method-assign]
    quant_fusion_pass.QuantFusionPass.call = _fuse_if_quantized(stock_fusion, quant_fusion_pass)
    try:
        with fast_decompositions(), keep_values():
            yield
    finally:
        pass_base._ExportPassBase.call = stock_call
        traceback.NodeSource = stock_source  # type: ignore[misc]
        ExportedProgram.run_decompositions = stock_decompose  # type: ignore[method-assign]
        fx.GraphModule.recompile = stock_compile  # type: ignore[method-assign]
        quant_fusion_pass.QuantFusionPass.call = stock_fusion


@contextmanager
def fast_decompositions() -> Iterator[None]:
    """Inside, decompositions share the list of the operators that they could preserve, and their kernels.

    Garbage collection waits until the end: a graph is thousands of objects that refer to each other.
    """
    from torch.export import decomp_utils
    from torch.export import exported_program as module_of_programs

    exported_program: Any = module_of_programs  # Any: its private names are replaced
    if exported_program._collect_all_valid_cia_ops.__module__ == __name__:  # nested
        yield
        return
    stock_list = exported_program._collect_all_valid_cia_ops
    stock_override = exported_program._override_composite_implicit_decomp
    holders: tuple[Any, ...] = (decomp_utils, exported_program)
    for module in holders:
        module._collect_all_valid_cia_ops = lambda: _list_operators(stock_list)
    override = partial(_override_kernels, stock_override)
    exported_program._override_composite_implicit_decomp = override
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with infer_shapes():
            yield
    finally:
        if was_enabled:
            gc.enable()
        for module in holders:
            module._collect_all_valid_cia_ops = stock_list
        exported_program._override_composite_implicit_decomp = stock_override


_lists: dict[Any, set[Any]] = {}  # by the state of the registry; at most one entry


def _list_operators(stock: Any) -> set[Any]:
    composite = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")  # type: ignore[attr-defined]
    state = (frozenset(composite), frozenset(torch.ops._dir))
    if state not in _lists:
        _lists.clear()
        _lists[state] = stock()
    return _lists[state]


@dataclass(frozen=True)
class _Kernels:
    """One operator's original kernels, those that a decomposition gave it, and its rule for fake tensors."""

    before: dict[Any, Any]
    during: dict[Any, Any]
    fake: Any


_kernels: dict[Any, _Kernels] = {}


@contextmanager
def _override_kernels(stock: Any, composites: dict[Any, Any]) -> Iterator[None]:
    """As torch does, but reusing kernels: only the composite kernel differs between two decompositions."""
    from torch._subclasses.fake_impls import _deregister_op_impl, op_implementations_dict

    free = [op for op in composites if op not in op_implementations_dict]
    ready = {op: _kernels[op] for op in free if op in _kernels and _kernels[op].before == op.py_kernels}
    rest = {op: kernel for op, kernel in composites.items() if op not in ready}
    before = {op: dict(op.py_kernels) for op in free if op in rest}
    with stock(rest):
        for op in before:
            _kernels[op] = _Kernels(before[op], dict(op.py_kernels), op_implementations_dict[op])
        try:
            for op, kernels in ready.items():
                composite = {torch._C.DispatchKey.CompositeImplicitAutograd: composites[op]}
                op.py_kernels.update(kernels.during | composite)
                op._dispatch_cache.clear()
                op_implementations_dict[op] = kernels.fake
            yield
        finally:
            for op, kernels in ready.items():
                op.py_kernels.clear()
                op.py_kernels.update(kernels.before)
                op._dispatch_cache.clear()
                _deregister_op_impl(op)


class _Code:
    """The source of a graph module that was not compiled yet."""

    def __init__(self, compile_module: Any) -> None:
        self.compile_module = compile_module

    def __get__(self, module: Any, kind: type) -> Any:
        self.compile_module(module)
        return vars(module)["_code"]


def _compile_if_called(stock: Any) -> Any:
    """A `recompile` that writes and compiles the Python code of a graph only when that is called or read."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        stock(self)
        return self(*args, **kwargs)

    def recompile(self: fx.GraphModule) -> None:
        information = getattr(self.graph._codegen, "pytree_info", None)
        if information is not None:
            self._in_spec, self._out_spec = information.in_spec, information.out_spec
        vars(self).pop("_code", None)
        type(self)._code, type(self).forward = _Code(stock), forward  # type: ignore[assignment, method-assign]

    return recompile


def _decompose_if_needed(stock: Any) -> Any:
    """As stock, for captured programs, which are functional, without the decompositions that would change nothing."""
    survivors: WeakKeyDictionary[ExportedProgram, set[Any]] = WeakKeyDictionary()  # by result of a decomposition

    def run_decompositions(
        self: ExportedProgram, decomp_table: Mapping[Any, Any] | None = None, **options: Any
    ) -> ExportedProgram:
        if decomp_table is not None and not decomp_table:
            return self  # executorch then decomposes with a table, which retraces the graph as well
        if decomp_table is not None and self in survivors and _operators(self) & set(decomp_table) <= survivors[self]:
            return self  # the caller changes what it gets in place, so never the captured program
        operators = set() if decomp_table is None else set(decomp_table)  # torch takes operators out of the table
        result: ExportedProgram = stock(self, decomp_table, **options)
        survivors[result] = _operators(result) & operators  # such as `sym_size`, which decomposes into itself
        return result

    return run_decompositions


def _operators(program: ExportedProgram) -> set[Any]:
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, fx.GraphModule)]
    return {node.target for graph in graphs for node in graph.nodes if node.op == "call_function"}


def _fuse_if_quantized(stock: Any, module: Any) -> Any:
    """As stock, without tracing 46 patterns of quantized operators for a graph that has none."""

    def call(self: Any, graph_module: fx.GraphModule) -> Any:
        patterns = module.get_quant_patterns_and_replacements
        if not any("quantize" in str(node.target) for node in graph_module.graph.nodes):
            module.get_quant_patterns_and_replacements = lambda values: []
        try:
            return stock(self, graph_module)
        finally:
            module.get_quant_patterns_and_replacements = patterns

    return call


def _retrace_if_needed(stock: Any, base: type) -> Any:
    from torch.fx.passes.infra.pass_base import PassResult

    def call(self: Any, graph_module: fx.GraphModule) -> PassResult:
        replaced = _REPLACED.get(type(self).__name__)
        if replaced is None:
            hooked = any(getattr(type(self), name, None) is not getattr(base, name, None) for name in _HOOKS)
        else:
            hooked = any(replaced(node.target) for node in graph_module.graph.nodes if node.op == "call_function")
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
    """A `NodeSource` that shares its parents' history instead of deep-copying it for each node and pass."""

    class ShortHistory(stock):  # type: ignore[valid-type, misc]
        def __init__(self, node: fx.Node | None, pass_name: str = "", action: Any = None) -> None:
            super().__init__(None, pass_name, action)
            if node is not None:
                self.node_info = stock.NodeInfo(node.name, str(node.target), id(node.graph))  # type: ignore[attr-defined]
                self.from_node = node.meta.get("from_node", [])

    return ShortHistory
