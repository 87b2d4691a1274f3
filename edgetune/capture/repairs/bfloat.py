"""Operators that XNNPACK does not have in bf16: computed in fp32, between conversions.

With `enable_bf16`, executorch 1.5.1's partitioner takes every operator in bf16, but a program with one of these does
not load. Attention is computed in fp32 from its queries to its output, with four conversions instead of eight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from edgetune.capture.operators import constants_of
from edgetune.capture.repairs import attention

_ATEN = torch.ops.aten
_TO = _ATEN._to_copy.default
_WITHOUT_BF16 = {
    "convolution", "conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d", "_softmax", "softmax", "bmm", "matmul",
    "avg_pool2d", "max_pool2d", "max_pool2d_with_indices", "adaptive_avg_pool2d", "_adaptive_avg_pool2d",
    "upsample_bilinear2d", "_native_batch_norm_legit_no_training", "batch_norm",
}  # fmt: skip


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kw: Any
) -> Any:
    if query.dtype != torch.bfloat16:
        return attention.attention(query, key, value, attn_mask, *args, **kw)
    wide = attn_mask.float() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    return attention.attention(query.float(), key.float(), value.float(), wide, *args, **kw).to(query.dtype)


REPAIRS: dict[Any, Any] = {_ATEN.scaled_dot_product_attention.default: _attention}


def widen(program: ExportedProgram) -> None:
    """Compute what has no kernel in bf16 in fp32, its weights included."""
    graph = program.graph
    for node in list(graph.nodes):
        if _is_bf16(node) and _has_no_kernel(node):
            for source in node.all_input_nodes:
                if _is_bf16(source):
                    _widen_input(program, node, source)
            _narrow_output(graph, node)


def _has_no_kernel(node: fx.Node) -> bool:
    if node.op != "call_function" or not str(node.target).startswith("aten."):
        return False
    name = str(node.target).split(".")[1]
    keeps = len(node.args) > 2 and bool(node.args[2])  # a mean that keeps its axes is a pooling there
    return name in _WITHOUT_BF16 or (name == "mean" and keeps and node.meta["val"].dim() == 4)


def _is_bf16(node: fx.Node) -> bool:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    return isinstance(first, Tensor) and first.dtype == torch.bfloat16


def _widen_input(program: ExportedProgram, node: fx.Node, source: fx.Node) -> None:
    if source.target == _TO and source.meta.get("edgetune_narrowed"):
        node.replace_input_with(source, source.args[0])  # type: ignore[arg-type]
    elif source.name in constants_of(program) and all(_has_no_kernel(user) for user in source.users):
        _widen_constant(program, source)
    else:
        with program.graph.inserting_before(node):
            node.replace_input_with(source, _convert(program.graph, source, torch.float32))


def _widen_constant(program: ExportedProgram, source: fx.Node) -> None:
    name = constants_of(program)[source.name]
    for holder in (program.state_dict, program.constants):
        if name in holder:
            wide = holder[name].detach().float()
            holder[name] = torch.nn.Parameter(wide, False) if name in program.state_dict else wide
    source.meta["val"] = source.meta["val"].float()


def _narrow_output(graph: fx.Graph, node: fx.Node) -> None:
    """Let the readers of an operator that now returns fp32 get bf16."""
    values = node.meta["val"]
    several = isinstance(values, (tuple, list))
    node.meta["val"] = (
        type(values)(v.float() if v.is_floating_point() else v for v in values) if several else values.float()
    )
    for output in [user for user in node.users if "getitem" in str(user.target)] if several else [node]:
        if several:
            output.meta["val"] = node.meta["val"][output.args[1]]
        if not output.meta["val"].is_floating_point():
            continue
        readers = list(output.users)
        with graph.inserting_after(output):
            narrow = _convert(graph, output, torch.bfloat16)
        narrow.meta["edgetune_narrowed"] = True
        for reader in readers:
            reader.replace_input_with(output, narrow)


def _convert(graph: fx.Graph, source: fx.Node, dtype: torch.dtype) -> fx.Node:
    node = graph.call_function(_TO, (source,), {"dtype": dtype})
    node.meta = {key: value for key, value in source.meta.items() if key != "val"}
    node.meta["val"] = source.meta["val"].to(dtype)
    return node
