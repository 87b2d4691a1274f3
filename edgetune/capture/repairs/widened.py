"""Operators that are computed in fp32 in a 16-bit program, between conversions.

Portable kernels of executorch 1.5.1 add up in the type of their inputs: a layer norm of 512 values in bf16 is wrong by
half of its largest value, and one in fp16 overflows. XNNPACK adds up in fp32, but has no convolution, pooling, softmax
or product of two activations in bf16: with `enable_bf16` its partitioner takes them, and the program does not load.
Attention is in fp32 from its queries to its output, with four conversions instead of eight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from edgetune.capture.operators import constants_of
from edgetune.capture.repairs import attention

_ATEN = torch.ops.aten
_TO = _ATEN._to_copy.default
_HALVES = (torch.bfloat16, torch.float16)
_NARROWED = "edgetune_narrowed"

_SUMS = frozenset(  # on portable kernels
    ("native_layer_norm", "layer_norm", "native_group_norm", "group_norm", "mean", "sum", "var", "var_mean", "std",
     "cumsum", "prod", "_log_softmax", "log_softmax", "logsumexp", "norm", "linalg_vector_norm", "_cdist_forward",
     "_pdist_forward", "_adaptive_avg_pool2d", "adaptive_avg_pool2d")
)  # fmt: skip
_PRODUCTS = frozenset(
    ("linear", "addmm", "mm", "bmm", "baddbmm", "matmul", "convolution", "conv1d", "conv2d", "conv_transpose1d",
     "conv_transpose2d")
)  # fmt: skip
_WITHOUT_BF16 = frozenset(
    ("convolution", "conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d", "_softmax", "softmax", "bmm", "matmul",
     "avg_pool2d", "max_pool2d", "max_pool2d_with_indices", "upsample_bilinear2d", "batch_norm",
     "_native_batch_norm_legit_no_training")
)  # fmt: skip


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kw: Any
) -> Any:
    if query.dtype != torch.bfloat16:
        return attention.attention(query, key, value, attn_mask, *args, **kw)
    wide = attn_mask.float() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    return attention.attention(query.float(), key.float(), value.float(), wide, *args, **kw).to(query.dtype)


REPAIRS: dict[Any, Any] = {_ATEN.scaled_dot_product_attention.default: _attention}


def widen(program: ExportedProgram, target: str) -> None:
    """Compute in fp32 what 16-bit kernels of this target lack or round too often."""
    is_wide = _is_wide_on_xnnpack if target == "xnnpack" else _is_wide_on_kernels
    for node in list(program.graph.nodes):
        half = _half(node)
        if half is not None and _is_operator(node) and is_wide(node, half):
            for source in node.all_input_nodes:
                if _half(source) is not None:
                    _widen_input(program, node, source, target, is_wide)
            _narrow_output(program.graph, node, half)


def _is_wide_on_xnnpack(node: fx.Node, half: torch.dtype) -> bool:
    return _name(node) in _SUMS or (half == torch.bfloat16 and _name(node) in _WITHOUT_BF16)


def _is_wide_on_kernels(node: fx.Node, _half: torch.dtype) -> bool:
    return _name(node) in _SUMS or _name(node) in _PRODUCTS or _name(node) in ("_softmax", "softmax", "avg_pool2d")


def _is_operator(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target).startswith("aten.")


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[1] if _is_operator(node) else ""


def _half(node: fx.Node) -> torch.dtype | None:
    """The 16-bit type of a node's value, or of its first one."""
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    return first.dtype if isinstance(first, Tensor) and first.dtype in _HALVES else None


def _widen_input(
    program: ExportedProgram,
    node: fx.Node,
    source: fx.Node,
    target: str,
    is_wide: Callable[[fx.Node, torch.dtype], bool],
) -> None:
    half = source.meta["val"].dtype
    if source.meta.get(_NARROWED):
        node.replace_input_with(source, source.args[0])  # type: ignore[arg-type]
    elif target == "xnnpack" and source.name in constants_of(program) and all(is_wide(u, half) for u in source.users):
        _widen_constant(program, source)  # a weight of XNNPACK's must be a constant
    else:
        with program.graph.inserting_before(node):
            node.replace_input_with(source, _convert(program.graph, source, torch.float32))


def _widen_constant(program: ExportedProgram, source: fx.Node) -> None:
    name = constants_of(program)[source.name]
    for holder in (program.state_dict, program.constants):
        if name in holder:
            wide = holder[name].detach().float()
            holder[name] = torch.nn.Parameter(wide, False) if isinstance(holder[name], torch.nn.Parameter) else wide
    source.meta["val"] = source.meta["val"].float()


def _narrow_output(graph: fx.Graph, node: fx.Node, half: torch.dtype) -> None:
    """Let the readers of an operator that now returns fp32 get 16 bits."""
    values = node.meta["val"]
    outputs = [node]
    if isinstance(values, (tuple, list)):
        node.meta["val"] = type(values)(v.float() if v is not None and v.dtype == half else v for v in values)
        outputs = list(node.users)
    else:
        node.meta["val"] = values.float()
    for output in outputs:
        before = output.meta["val"].dtype
        output.meta["val"] = output.meta["val"].float() if before == half else output.meta["val"]
        if output is not node and before != half:
            continue
        readers = list(output.users)
        with graph.inserting_after(output):
            narrow = _convert(graph, output, half)
        narrow.meta[_NARROWED] = True
        for reader in readers:
            reader.replace_input_with(output, narrow)


def _convert(graph: fx.Graph, source: fx.Node, dtype: torch.dtype) -> fx.Node:
    node = graph.call_function(_TO, (source,), {"dtype": dtype})
    node.meta = {key: value for key, value in source.meta.items() if key != "val"}
    node.meta["val"] = source.meta["val"].to(dtype)
    return node
