"""The operators of an XNNPACK delegate, read from its flatbuffer.

What XNNPACK itself changes when it loads a delegate is followed where it changes the time: an operator between two
8-bit values that is computed in fp32 becomes one lookup in a table.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgetune.program.operators import DType, Kind, Operator

_BITS = {
    "fp32": 32, "fp16": 16, "bf16": 16, "qint8": 8, "quint8": 8, "qdint8": 8, "qpint8": 8, "qcint8": 8, "qint32": 32,
    "qcint32": 32, "int32": 32, "qcint4": 4, "qbint4": 4, "pfp32": 32,
}  # fmt: skip
_ABSENT = 2**32 - 1  # an optional tensor that is not there
_GIVEN, _RETURNED = 1, 2  # flags of tensors that a delegate gets and returns
_LOOKED_UP = frozenset({"qint8", "quint8"})
FUNCTIONS = frozenset(
    {"abs", "ceiling", "clamp", "cos", "elu", "exp", "floor", "gelu", "hardswish", "leaky-re-lu", "log", "negate",
     "reciprocal-square-root", "sigmoid", "sin", "square", "square-root", "tanh"}
)  # fmt: skip
LOOKUP = "lookup"
_KINDS: dict[str, Kind] = {
    "fully-connected": "linear",
    "batch-matrix-multiply": "matmul",
    "scaled-dot-product-attention": "matmul",
    "depthwise-conv2d": "depthwise-conv",
    "conv-transpose2d": "conv",
    "softmax": "softmax",
    "global-avg-pooling2d": "reduction",
    "avg-pooling2d": "pooling",
    "max-pooling2d": "pooling",
    "arg-max-pooling2d": "pooling",
    **dict.fromkeys(
        ("static-transpose", "static-slice", "static-constant-pad", "static-reshape", "static-resize-bilinear2d",
         "concatenate", "copy"),
        "data-movement",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Value:
    """A tensor of a delegate."""

    dtype: str
    dims: tuple[int, ...]
    constant: bool
    scale_bytes: int
    external: bool  # an input or an output of the delegate
    returned: bool  # an output

    @property
    def elements(self) -> int:
        """The number of its values."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Its size, scales included."""
        return self.elements * _BITS.get(self.dtype, 32) // 8 + self.scale_bytes


@dataclass(frozen=True)
class Node:
    """What XNNPACK runs as one operator."""

    name: str
    settings: dict[str, Any]
    module: str

    @property
    def inputs(self) -> list[int]:
        """Ids of the tensors that it reads, weights among them."""
        keys = (key for key in self.settings if key.endswith("_id") and not key.startswith("output"))
        return [self.settings[key] for key in keys if self.settings[key] != _ABSENT]

    @property
    def output(self) -> int:
        """Id of the tensor that it writes."""
        return int(self.settings["output_id"] if "output_id" in self.settings else self.settings["output_value_id"])


@lru_cache(maxsize=256)
def _graph(payload: bytes) -> Any:
    """The delegate's flatbuffer as JSON, by executorch's own compiler and schema."""
    from importlib import resources

    from executorch.backends.xnnpack import serialization
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    flat = payload[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size]
    with tempfile.TemporaryDirectory(prefix="edgetune-xnnpack-") as name:
        folder = Path(name)
        (folder / "graph.bin").write_bytes(flat)
        schema = folder / "schema.fbs"
        schema.write_text((resources.files(serialization) / "schema.fbs").read_text(encoding="utf-8"), "utf-8")
        _flatc_decompile(name, str(schema), str(folder / "graph.bin"), ["--raw-binary"])
        text = (folder / "graph.json").read_text(encoding="utf-8")
    return json.loads(re.sub(r"(?<=: )([+-]?)inf\b", r"\1Infinity", text))  # an open bound of a clamp


def resize(dims: Sequence[int], dynamic: tuple[int, int] | None) -> tuple[int, ...]:
    """The dims with the dynamic axis at its size in this call."""
    sized = list(dims)
    if dynamic is not None and dynamic[0] in sized:
        sized[sized.index(dynamic[0])] = dynamic[1]
    return tuple(sized)


@dataclass(frozen=True)
class XnnpackDelegate:
    """What XNNPACK runs in one call, in order."""

    nodes: tuple[Node, ...]
    values: dict[int, Value]

    @property
    def operators(self) -> Iterator[Operator]:
        """Its nodes as operators."""
        return (_operator(node, self.values) for node in self.nodes)


def read_delegate(payload: bytes, modules: dict[int, str], dynamic: tuple[int, int] | None = None) -> XnnpackDelegate:
    """A delegate from its part of the file.

    `modules`: by the debug handles of its nodes. `dynamic`: see `edgetune.program.executed.execution_of`.
    """
    graph = _graph(payload)
    values = {}
    for value in graph["xvalues"]:
        fields, scales = value["xvalue_union"], 0
        if "tensor_value" in fields:
            scales = _scale_bytes(fields)
            fields = fields["tensor_value"]
        constant = fields["constant_buffer_idx"] > 0
        values[fields["id_out"]] = Value(
            dtype=fields["datatype"].removeprefix("xnn_datatype_"),
            dims=tuple(fields["dims"]) if constant else resize(fields["dims"], dynamic),
            constant=constant,
            scale_bytes=scales if constant else 0,
            external=bool(fields["flags"] & (_GIVEN | _RETURNED)),
            returned=bool(fields["flags"] & _RETURNED),
        )
    nodes = [
        Node(_name(node["xnode_union_type"]), node["xnode_union"], modules.get(node["debug_handle"], ""))
        for node in graph["xnodes"]
    ]
    return XnnpackDelegate(tuple(_fuse_lookups(nodes, values)), values)


def _name(union_type: str) -> str:
    """`XNNGlobalAvgPooling2d` -> `global-avg-pooling2d`; a concatenation has one kernel for so many pieces."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", union_type.removeprefix("XNN")).lower()
    return re.sub(r"(?<=concatenate)\d", "", name)


def _fuse_lookups(nodes: Sequence[Node], tensors: Mapping[int, Value]) -> Iterator[Node]:
    """The nodes, with a lookup for each function of one value between a conversion from 8 bits and one to 8 bits.

    XNNPACK fuses the three where nothing else reads what lies between.
    """
    readers: dict[int, list[Node]] = {}
    for node in nodes:
        for index in node.inputs:
            readers.setdefault(index, []).append(node)

    def next_node(node: Node) -> Node | None:
        following = readers.get(node.output, [])
        return following[0] if len(following) == 1 and not tensors[node.output].returned else None

    replaced: dict[int, Node | None] = {}
    for node in nodes:
        if node.name != "convert" or tensors[node.inputs[0]].dtype not in _LOOKED_UP:
            continue
        function = next_node(node)
        last = next_node(function) if function is not None and function.name in FUNCTIONS else None
        if function is None or last is None or last.name != "convert":
            continue
        if tensors[last.output].dtype in _LOOKED_UP:
            settings = {"input_id": node.inputs[0], "output_id": last.output}
            replaced |= {id(node): None, id(function): Node(LOOKUP, settings, function.module), id(last): None}
    for node in nodes:
        kept = replaced.get(id(node), node)
        if kept is not None:
            yield kept


def _scale_bytes(tensor: dict[str, Any]) -> int:
    quantized = tensor["quant_params"]
    if "group_size" in quantized:
        return 2 * int(quantized.get("num_scales", 0))
    return 4 * int(quantized.get("num_scales", 0)) if quantized.get("num_scales", 0) > 0 else 0


def _operator(node: Node, tensors: Mapping[int, Value]) -> Operator:
    name, settings = node.name, node.settings
    used = [tensors[index] for index in node.inputs if index in tensors]
    out = tensors[node.output]
    weights, activations = [t for t in used if t.constant], [t for t in used if not t.constant]
    window = _kernel_window(settings)
    return Operator(
        operator=f"xnnpack.{_conversion_name(name, activations, out)}",
        module=node.module,
        kind=_kind(name, window),
        dtype=_dtype(weights, activations, out),
        output_shape=out.dims,
        macs=_macs(name, settings, used, out, window),
        weight_bytes=sum(t.bytes for t in weights),
        activation_bytes=sum(t.bytes for t in activations) + out.bytes,
        delegated=True,
        columns=_columns(name, settings, used, out),
        groups=_groups(name, settings, out),
        window=_window(name, settings, used, out),
    )


def _conversion_name(name: str, read: Sequence[Value], out: Value) -> str:
    """A conversion is named by its types: to int8 with a scale per row it first looks for the largest value."""
    return f"convert-{read[0].dtype}-{out.dtype}" if name == "convert" and read else name


def _kind(name: str, window: int) -> Kind:
    if name == "conv2d":
        return "pointwise-conv" if window == 1 else "conv"
    return _KINDS.get(name, "elementwise")


def _dtype(weights: Sequence[Value], activations: Sequence[Value], out: Value) -> DType:
    if any(t.dtype in ("qcint4", "qbint4") for t in weights):
        return "8da4w"
    if any(t.dtype in ("qint8", "quint8", "qdint8", "qcint8") for t in (*weights, *activations[:1], out)):
        return "int8"
    narrow: DType | None = next((d for d in ("fp16", "bf16") if d == out.dtype), None)  # type: ignore[assignment]
    return narrow or "fp32"


def _macs(name: str, settings: dict[str, Any], used: Sequence[Value], out: Value, window: int) -> int:
    if name == "fully-connected":
        return out.elements * used[1].dims[-1]
    if name == "conv2d":
        return out.elements * window * int(settings["group_input_channels"])
    if name == "depthwise-conv2d":
        return out.elements * window
    if name == "conv-transpose2d":
        return used[0].elements * window * int(settings["group_output_channels"])
    if name == "batch-matrix-multiply":
        return out.elements * used[0].dims[-1]
    if name == "scaled-dot-product-attention":
        return 2 * out.elements * used[1].dims[-2]
    return 0


def _kernel_window(settings: dict[str, Any]) -> int:
    high = settings.get("kernel_height", settings.get("pooling_height", 1))
    return int(high * settings.get("kernel_width", settings.get("pooling_width", 1)))


def _window(name: str, settings: dict[str, Any], used: Sequence[Value], out: Value) -> int:
    """See `Operator.window`."""
    if name == "global-avg-pooling2d":
        return used[0].elements // max(out.elements, 1)
    if name == "static-transpose":
        return _transpose_runs(settings["perm"], out.dims)[1]
    return _kernel_window(settings)


def _columns(name: str, settings: dict[str, Any], used: Sequence[Value], out: Value) -> int:
    """See `Operator.columns`."""
    if name == "conv2d":
        return int(settings["group_output_channels"])
    if name == "static-transpose":
        return _transpose_runs(settings["perm"], out.dims)[0]
    if name == "static-slice":
        return _slice_run(used[0].dims, out.dims)
    if name == "static-reshape":
        return out.elements
    if name == "concatenate":
        return max(math.prod(out.dims[int(settings["axis"]) :]) // len(used), 1)
    return out.dims[-1] if out.dims else 1


def _transpose_runs(perm: Sequence[int], dims: Sequence[int]) -> tuple[int, int]:
    """Innermost sizes of a transpose's output, and of its input if that is another axis, else 1. `dims`: of the output.

    Axes of size 1 are ignored, and axes that stay neighbours count as one.
    """
    axes = [axis for axis, size in zip(perm, dims, strict=True) if size != 1]
    sizes = [size for size in dims if size != 1]
    runs: list[tuple[int, int]] = []  # the last axis of each, as it was read, and its values
    for axis, size in zip((sorted(axes).index(axis) for axis in axes), sizes, strict=True):
        if runs and runs[-1][0] + 1 == axis:
            runs[-1] = (axis, runs[-1][1] * size)
        else:
            runs.append((axis, size))
    if not runs:
        return 1, 1
    written, read = runs[-1], max(runs)
    return written[1], 1 if read == written else read[1]


def _slice_run(whole: Sequence[int], part: Sequence[int]) -> int:
    run = 1
    for full, taken in zip(reversed(whole), reversed(part), strict=False):
        run *= taken
        if full != taken:
            break
    return run


def _groups(name: str, settings: dict[str, Any], out: Value) -> int:
    if name == "conv2d":
        return int(settings["groups"])
    return math.prod(out.dims[:-2]) if name == "batch-matrix-multiply" else 1
