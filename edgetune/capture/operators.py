"""The operators of an exported program: what each computes, reads and writes, and which module it comes from.

They are read from the ATen graph before a backend takes it. Quantize, dequantize and the search for their scales count
as part of the operator that they feed; views and what the compiler folded into constants are free. Both are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from edgetune.core.inputs import tensors_in
from edgetune.program.operator_kinds import is_free, kind_of, short_name
from edgetune.program.operators import DType, Kind, Operator

_NUMBER = "edgetune_operator"
_WRAPPER = re.compile(r"^model(__\w+)?(\.|$)")  # the wrapper's child; of several methods, with the method's name

_QUANTIZING = (
    "quantized_decomposed.quantize", "quantized_decomposed.dequantize", "quantized_decomposed.choose_qparams",
    "torchao.quantize_affine", "torchao.dequantize_affine", "torchao.choose_qparams_affine",
)  # fmt: skip
_DTYPES: dict[torch.dtype, DType] = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "int8"}


@dataclass(frozen=True)
class Placed:
    """Where the numbered operators ended: in a delegate, or as portable kernels `(name, number)`."""

    delegated: frozenset[int]
    portable: tuple[tuple[str, int | None], ...]
    delegates: int


@dataclass(frozen=True)
class _Operand:
    """A tensor argument, behind its dequantization."""

    node: fx.Node
    bits: int  # of one element as stored or moved
    scale_bytes: int
    quantized: bool
    dynamic: bool  # quantized with a scale computed at run time


def number(program: ExportedProgram) -> None:
    """Give every operator of the graph a number that its nodes keep during lowering."""
    for index, node in enumerate(program.graph.nodes):
        if node.op == "call_function":
            node.meta["custom"] = {**node.meta.get("custom", {}), _NUMBER: index}


def number_of(node: fx.Node) -> int | None:
    """The number that `number` gave the node, if it still has one."""
    index: int | None = node.meta.get("custom", {}).get(_NUMBER)
    return index


def modules(program: ExportedProgram) -> dict[int, str]:
    """Module path of every numbered operator, in the user's own names."""
    paths = {}
    for node in program.graph.nodes:
        index = number_of(node)
        if index is not None:
            paths[index] = module_of(node)
    return paths


def module_of(node: fx.Node) -> str:
    """The module that a node of the captured program comes from, in the user's own names."""
    stack = node.meta.get("nn_module_stack") or {}
    return shorten(str(list(stack.values())[-1][0])) if stack else ""


def macs_of(program: ExportedProgram) -> dict[int, int]:
    """Multiply-accumulates of every numbered operator that has any."""
    macs_by_number = {}
    for node in program.graph.nodes:
        index = number_of(node)
        macs = 0 if index is None or _is_quantizing(node) else _macs(node, _kind(node), _elements(_shape(node)))
        if index is not None and macs:
            macs_by_number[index] = macs
    return macs_by_number


def shorten(path: str) -> str:
    """A module path in the user's own names: without the wrapper's child."""
    return _WRAPPER.sub("", path)


def describe(program: ExportedProgram, placed: Placed) -> tuple[Operator, ...]:
    """One record for each operator that runs, in the order of the graph."""
    constants = constants_of(program)
    portable = {index for _, index in placed.portable if index is not None}
    records = []
    for node in program.graph.nodes:
        index = number_of(node)
        if index is None or _is_quantizing(node) or is_free(str(node.target)):
            continue
        if not str(node.target).startswith("<") and (index in portable or index in placed.delegated):
            records.append(_operator(node, constants, delegated=index not in portable))
    return tuple(records)


def constants_of(program: ExportedProgram) -> dict[str, str]:
    """The names of the program's constants by those of their placeholders."""
    signature = program.graph_signature
    return {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }


def _operator(node: fx.Node, constants: Container[str], *, delegated: bool) -> Operator:
    changed = node.kwargs.get("_all_bases")
    if changed is not None:
        return _update(node, changed, delegated=delegated)
    sources = [_operand(argument) for argument in node.all_input_nodes]
    weights = [s for s in sources if s.node.name in constants]
    activations = [s for s in sources if s.node.name not in constants]
    kind = _kind(node)
    shape = _shape(node)
    elements = _elements(shape)
    weight_bytes = sum(_elements(_shape(s.node)) * s.bits // 8 + s.scale_bytes for s in weights)
    if kind == "embedding" and weights:  # only the rows that are looked up are read
        table = weights[0]
        rows, width = _shape(table.node)
        read_rows = elements // width
        weight_bytes = elements * table.bits // 8 + read_rows * (table.scale_bytes // rows)
    read = sum(_elements(_shape(s.node)) * s.bits // 8 for s in activations)
    return Operator(
        operator=str(node.target),
        module=module_of(node),
        kind=kind,
        dtype=_dtype(node, kind, weights, activations),
        output_shape=shape,
        macs=_macs(node, kind, elements),
        weight_bytes=weight_bytes,
        activation_bytes=read + elements * _written_bits(node) // 8,
        delegated=delegated,
    )


def _update(node: fx.Node, changed: Any, *, delegated: bool) -> Operator:
    """An operator that writes into buffers, as `auto_functionalized_v2` wraps it: it reads and writes the new part."""
    new = next((source for source in node.all_input_nodes if source not in changed), node)
    value = _value(new)
    part_bytes = _elements(_shape(new)) * value.element_size() if value is not None else 0
    return Operator(
        operator=str(node.args[0]),
        module=module_of(node),
        kind="data-movement",
        dtype=_DTYPES.get(value.dtype, "fp32") if value is not None else "fp32",
        output_shape=_shape(new),
        macs=0,
        weight_bytes=0,
        activation_bytes=2 * part_bytes,
        delegated=delegated,
    )


def _operand(node: fx.Node) -> _Operand:
    """Look through dequantize, and through quantize if the scale is computed at run time."""
    value = _value(node)
    bits = 8 * value.element_size() if value is not None else 0
    if not (_is_quantizing(node) and "dequantize" in str(node.target)):
        rounded = node.op == "call_function" and _is_rounded(node)
        return _Operand(node, 8 if rounded else bits, 0, quantized=rounded, dynamic=False)
    stored = node.args[0]
    assert isinstance(stored, fx.Node)
    limits = [a for a in node.args if isinstance(a, int) and not isinstance(a, bool)]
    low, high = (limits[-2], limits[-1]) if len(limits) >= 2 else (-128, 127)
    scale = node.args[2] if "affine" in str(node.target) else node.args[1]
    dynamic = isinstance(scale, fx.Node) and "choose_qparams" in str(scale.args[0] if scale.args else "")
    if dynamic and stored.op == "call_function":
        inner = stored.args[0]
        assert isinstance(inner, fx.Node)
        held = _value(inner)
        return _Operand(inner, 8 * held.element_size() if held is not None else bits, 0, quantized=True, dynamic=True)
    # XNNPACK keeps the scales of 4-bit groups in 16 bits; all others have 32, those of looked-up rows too
    width = 2 if high - low < 16 and not any("embedding" in str(user.target) for user in node.users) else 4
    scales = _elements(_shape(scale)) * width if isinstance(scale, fx.Node) else 0
    if stored.op == "call_function" and _is_quantizing(stored):
        return _Operand(stored, 8, 0, quantized=True, dynamic=False)
    return _Operand(stored, (high - low).bit_length(), scales, quantized=True, dynamic=False)


def _written_bits(node: fx.Node) -> int:
    value = _value(node)
    if value is None:
        return 0
    return 8 if _is_rounded(node) else 8 * value.element_size()


def _is_rounded(node: fx.Node) -> bool:
    """Whether the node's output has a fixed 8-bit scale; a clamp after it is fused."""
    users = list(node.users)
    if len(users) == 1 and short_name(str(users[0].target)) in ("relu", "hardtanh"):
        return _is_rounded(users[0])
    return bool(users) and all(short_name(str(user.target)).startswith("quantize_per") for user in users)


def _dtype(node: fx.Node, kind: Kind, weights: list[_Operand], activations: list[_Operand]) -> DType:
    narrow = [w for w in weights if w.quantized]
    if narrow and any(a.dynamic for a in activations):
        return "8da4w" if min(w.bits for w in narrow) <= 4 else "int8"
    if narrow and kind == "embedding":
        return "int8"
    if any(a.quantized and not a.dynamic for a in activations) and (narrow or not weights):
        return "int8"
    if "quantized_sdpa" in str(node.target):  # integers in, floats out
        return "int8"
    value = _value(node)
    return _DTYPES.get(value.dtype, "fp32") if value is not None else "fp32"


def _kind(node: fx.Node) -> Kind:
    name = short_name(str(node.target))
    if name not in ("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose2d"):
        return kind_of(str(node.target))
    weight = _shape(node.args[1])
    groups = node.args[-1] if name == "convolution" else node.args[6] if len(node.args) > 6 else 1
    if isinstance(groups, int) and groups > 1 and weight[1] == 1:
        return "depthwise-conv"
    return "pointwise-conv" if all(size == 1 for size in weight[2:]) else "conv"


def _macs(node: fx.Node, kind: Kind, elements: int) -> int:
    name = short_name(str(node.target))
    if kind in ("conv", "pointwise-conv", "depthwise-conv"):
        return elements * _elements(_shape(node.args[1])[1:])
    if name in ("addmm", "baddbmm"):
        return elements * _shape(node.args[1])[-1]
    if kind in ("linear", "matmul"):
        return elements * _shape(node.args[0])[-1]
    return 0


def _is_quantizing(node: fx.Node) -> bool:
    return str(node.target).startswith(_QUANTIZING)


def _value(node: Any) -> Tensor | None:
    return next(tensors_in(node.meta.get("val")), None) if isinstance(node, fx.Node) else None


def _shape(node: Any) -> tuple[int, ...]:
    value = _value(node)
    # a size that is known only at run time counts as 0
    return tuple(size if isinstance(size, int) else _bound(size) for size in value.shape) if value is not None else ()


def _bound(size: Any) -> int:
    hint = size.node.hint if hasattr(size, "node") else None
    return int(hint) if isinstance(hint, int) else 0


def _elements(shape: tuple[int, ...]) -> int:
    """How many values; 0 if known only at run time."""
    return math.prod(shape)


def delegated_pct(operators: Sequence[Operator]) -> tuple[float, float]:
    """Delegated shares, in percent: of the multiply-accumulates, and of the operators."""
    taken = [operator for operator in operators if operator.delegated]
    macs = sum(operator.macs for operator in operators)
    taken_macs = sum(operator.macs for operator in taken)
    return 100.0 * taken_macs / macs if macs else 0.0, 100.0 * len(taken) / len(operators) if operators else 0.0
