"""The operators of a program as the runtime executes them, read from the file alone.

They differ from those of `edgetune.capture.operators` by what the backend's compiler does: it folds operators, and adds
transposes before convolutions and conversions around 8-bit operators, all of which take time. XNNPACK's delegates are
read from their flatbuffer; each call of any other backend is one operator.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgetune.core.errors import EdgetuneError
from edgetune.program.operator_kinds import is_free, kind_of
from edgetune.program.operators import DType, Kind, Operator

_BITS = {
    "fp32": 32, "fp16": 16, "bf16": 16, "qint8": 8, "quint8": 8, "qdint8": 8, "qpint8": 8, "qcint8": 8, "qint32": 32,
    "qcint32": 32, "int32": 32, "qcint4": 4, "qbint4": 4, "pfp32": 32,
}  # fmt: skip
_CACHE_UPDATE = "update_cache"  # executorch's kernel that writes keys or values into a cache
_ABSENT = 2**32 - 1  # an optional tensor that is not there
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
_PORTABLE_BYTES = {"BYTE": 1, "CHAR": 1, "BOOL": 1, "SHORT": 2, "HALF": 2, "BFLOAT16": 2, "LONG": 8, "DOUBLE": 8}
_PORTABLE_DTYPES: dict[str, DType] = {"HALF": "fp16", "BFLOAT16": "bf16", "CHAR": "int8", "BYTE": "int8"}


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    dims: tuple[int, ...]
    constant: bool
    scale_bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return self.elements * _BITS.get(self.dtype, 32) // 8 + self.scale_bytes


def executed_operators(
    data: bytes,
    method: str = "forward",
    modules: Sequence[str | dict[int, str]] = (),
    dynamic: tuple[int, int] | None = None,
) -> tuple[Operator, ...]:
    """Every operator that the runtime executes in one call of `method`, in order; sizes at their upper bounds.

    `data`: the bytes of the `.pte`. `modules`: for each instruction its module, for a delegate a table by the debug
    handles of its nodes; ignored if their number differs. `dynamic`: the bound of the dynamic axis, and its size in
    this call. In each activation it is the first axis as long as the bound, since other axes, such as the width of a
    head, may have the same size; tensors that the plan has as static keep theirs. Raises `EdgetuneError` for an unknown
    method and for data that is not a program.
    """
    from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program
    from executorch.exir._serialize._program import _ExtendedHeader

    if data[4:6] != b"ET":  # the flatbuffer's own mark: ET12 and its kin
        raise EdgetuneError("this is not an ExecuTorch program")
    header = _ExtendedHeader.from_bytes(data[8:40].ljust(32, b"\0"))
    size, base = (header.program_size, header.segment_base_offset) if header.is_valid() else (len(data), 0)
    program = _flatbuffer_to_program(data[:size])
    plans = {plan.name: plan for plan in program.execution_plan or ()}
    if method not in plans:
        raise EdgetuneError("the program has no such method", got=method, allowed=plans)
    plan = plans[method]
    for value in plan.values:
        tensor = value.val
        if type(tensor).__name__ == "Tensor" and not _is_constant(tensor) and tensor.shape_dynamism:
            tensor.sizes = list(_sized(tensor.sizes or (), dynamic))
    calls = list(_instructions(plan))
    named = modules if len(modules) == len(calls) else [""] * len(calls)
    operators: list[Operator] = []
    for instruction, module in zip(calls, named, strict=True):
        if hasattr(instruction, "op_index"):
            operators.append(_portable(plan, instruction, module if isinstance(module, str) else ""))
            continue
        delegate = plan.delegates[instruction.delegate_index]
        payload = _payload(program, data, base, delegate)
        handles = module if isinstance(module, dict) else {}
        if delegate.id == "XnnpackBackend":
            operators += _xnnpack(payload, handles, dynamic)
        else:
            operators.append(_opaque(plan, instruction, delegate, len(payload)))
    return tuple(operators)


def _instructions(plan: Any) -> Iterator[Any]:
    """Calls of delegates, and of kernels that are not free."""
    for chain in plan.chains:
        for instruction in chain.instructions:
            arguments = instruction.instr_args
            if hasattr(arguments, "delegate_index"):
                yield arguments
            elif hasattr(arguments, "op_index"):
                name = plan.operators[arguments.op_index].name
                if not is_free(name.replace("::", ".")):
                    yield arguments


def _payload(program: Any, data: bytes, base: int, delegate: Any) -> bytes:
    where = delegate.processed
    if int(where.location) == 0:
        return bytes(program.backend_delegate_data[where.index].data)
    segment = program.segments[where.index]
    start = base + segment.offset
    return data[start : start + segment.size]


# Portable kernels


def _portable(plan: Any, call: Any, module: str) -> Operator:
    """One kernel outside the delegates. Its last tensor is its output."""
    operator = plan.operators[call.op_index]
    values = [plan.values[index].val for index in call.args]
    tensors, last = list(_tensors(plan, values)), values[-1:]
    written = list(_tensors(plan, last))  # several outputs end with their list
    read = [t for t in tensors if not any(t is w for w in written)]
    weights = [t for t in read if _is_constant(t)]
    activations = [t for t in read if not any(t is weight for weight in weights)]
    name = ".".join(filter(None, (operator.name.replace("::", "."), operator.overload)))
    if _CACHE_UPDATE in name:  # of the new rows into themselves: the rest of the cache stays
        activations, weights, written = read[:1], [], read[:1]
    shape = tuple(written[0].sizes or ()) if written else ()
    rows = math.prod(shape)
    embedding = "embedding" in name
    weight_bytes = _bytes(written[0]) if embedding and written else sum(map(_bytes, weights))
    scalar = str(written[0].scalar_type.name) if written else "FLOAT"
    if "convolution" in name and any(type(value).__name__ == "Bool" and value.bool_val for value in values):
        rows = math.prod(read[0].sizes or ())  # transposed: each value read is multiplied, not each one written
    macs = _attention_macs(tensors) if "sdpa" in name else _product_macs(name, read, rows)
    return Operator(
        operator=name,
        module=module,
        kind="embedding" if embedding else kind_of(name),  # embedding_byte among them
        dtype=_PORTABLE_DTYPES.get(scalar, "fp32"),
        output_shape=shape,
        macs=macs,
        weight_bytes=weight_bytes,
        activation_bytes=sum(map(_bytes, activations)) + sum(map(_bytes, written)),
        delegated=False,
        columns=shape[-1] if shape else 1,
    )


def _tensors(plan: Any, values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        kind = type(value).__name__
        if kind == "Tensor":
            yield value
        elif kind == "TensorList":
            yield from (plan.values[index].val for index in value.items)


def _is_constant(tensor: Any) -> bool:
    return bool(tensor.data_buffer_idx > 0 and tensor.allocation_info is None)


def _bytes(tensor: Any) -> int:
    return math.prod(tensor.sizes or ()) * _PORTABLE_BYTES.get(str(tensor.scalar_type.name), 4)


def _product_macs(name: str, read: Sequence[Any], elements: int) -> int:
    if kind_of(name) in ("linear", "matmul") and read:
        first = read[1] if "addmm" in name and len(read) > 1 else read[0]
        return int(elements * (first.sizes or [1])[-1])
    if "convolution" in name and len(read) > 1:
        return elements * int(math.prod((read[1].sizes or [1])[1:]))
    return 0


def _attention_macs(tensors: Sequence[Any]) -> int:
    """Two products of the queries (1, n, heads, width) with the whole cache."""
    query, key = tensors[0].sizes or [1], tensors[1].sizes or [1, 1]
    return 2 * int(math.prod(query)) * int(key[1])


def _opaque(plan: Any, call: Any, delegate: Any, payload_bytes: int) -> Operator:
    """A call into a backend whose operators are unknown."""
    tensors = list(_tensors(plan, [plan.values[index].val for index in call.args]))
    shape = tuple(tensors[-1].sizes or ()) if tensors else ()
    return Operator(
        operator=str(delegate.id),
        module="",
        kind="other",
        dtype="fp32",
        output_shape=shape,
        macs=0,
        weight_bytes=payload_bytes,
        activation_bytes=sum(map(_bytes, tensors)),
        delegated=True,
    )


# XNNPACK


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


def _sized(dims: Sequence[int], dynamic: tuple[int, int] | None) -> tuple[int, ...]:
    """The dims with the dynamic axis at its size in this call."""
    sized = list(dims)
    if dynamic is not None and dynamic[0] in sized:
        sized[sized.index(dynamic[0])] = dynamic[1]
    return tuple(sized)


def _xnnpack(payload: bytes, modules: dict[int, str], dynamic: tuple[int, int] | None) -> Iterator[Operator]:
    graph = _graph(payload)
    tensors = {}
    for value in graph["xvalues"]:
        fields, scales = value["xvalue_union"], 0
        if "tensor_value" in fields:
            scales = _scale_bytes(fields)
            fields = fields["tensor_value"]
        constant = fields["constant_buffer_idx"] > 0
        dtype = fields["datatype"].removeprefix("xnn_datatype_")
        dims = tuple(fields["dims"]) if constant else _sized(fields["dims"], dynamic)
        tensors[fields["id_out"]] = _Tensor(dtype, dims, constant, scales if constant else 0)
    for node in graph["xnodes"]:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", node["xnode_union_type"].removeprefix("XNN")).lower()
        name = re.sub(r"(?<=concatenate)\d", "", name)  # one kernel, of so many pieces
        yield _node(name, node["xnode_union"], tensors, modules.get(node["debug_handle"], ""))


def _scale_bytes(tensor: dict[str, Any]) -> int:
    quantized = tensor["quant_params"]
    if "group_size" in quantized:
        return 2 * int(quantized.get("num_scales", 0))
    return 4 * int(quantized.get("num_scales", 0)) if quantized.get("num_scales", 0) > 0 else 0


def _node(name: str, settings: dict[str, Any], tensors: dict[int, _Tensor], module: str) -> Operator:
    ids = [settings[key] for key in settings if key.endswith("_id") and not key.startswith("output")]
    used = [tensors[index] for index in ids if index != _ABSENT and index in tensors]
    out = tensors[settings["output_id"] if "output_id" in settings else settings["output_value_id"]]
    weights, activations = [t for t in used if t.constant], [t for t in used if not t.constant]
    window = _kernel_window(settings)
    return Operator(
        operator=f"xnnpack.{_conversion_name(name, activations, out)}",
        module=module,
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


def _conversion_name(name: str, read: Sequence[_Tensor], out: _Tensor) -> str:
    """A conversion is named by its types: to int8 with a scale per row it first looks for the largest value."""
    return f"convert-{read[0].dtype}-{out.dtype}" if name == "convert" and read else name


def _kind(name: str, window: int) -> Kind:
    if name == "conv2d":
        return "pointwise-conv" if window == 1 else "conv"
    return _KINDS.get(name, "elementwise")


def _dtype(weights: Sequence[_Tensor], activations: Sequence[_Tensor], out: _Tensor) -> DType:
    if any(t.dtype in ("qcint4", "qbint4") for t in weights):
        return "8da4w"
    if any(t.dtype in ("qint8", "quint8", "qdint8", "qcint8") for t in (*weights, *activations[:1], out)):
        return "int8"
    narrow: DType | None = next((d for d in ("fp16", "bf16") if d == out.dtype), None)  # type: ignore[assignment]
    return narrow or "fp32"


def _macs(name: str, settings: dict[str, Any], used: Sequence[_Tensor], out: _Tensor, window: int) -> int:
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


def _window(name: str, settings: dict[str, Any], used: Sequence[_Tensor], out: _Tensor) -> int:
    """See `Operator.window`."""
    if name == "global-avg-pooling2d":
        return used[0].elements // max(out.elements, 1)
    if name == "static-transpose":
        return _transpose_runs(settings["perm"], out.dims)[1]
    return _kernel_window(settings)


def _columns(name: str, settings: dict[str, Any], used: Sequence[_Tensor], out: _Tensor) -> int:
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


def _groups(name: str, settings: dict[str, Any], out: _Tensor) -> int:
    if name == "conv2d":
        return int(settings["groups"])
    return math.prod(out.dims[:-2]) if name == "batch-matrix-multiply" else 1
