"""The operators of a program as the runtime executes them, read from the file alone.

They differ from those of `edgetune.capture.operators` by what the backend's compiler does: it folds operators, and adds
transposes before convolutions and conversions around 8-bit operators, all of which take time. XNNPACK's delegates are
read from their flatbuffer; each call of any other backend is one operator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.core.errors import EdgetuneError
from edgetune.program.operator_kinds import is_free, kind_of
from edgetune.program.operators import DType, Operator
from edgetune.program.workspace import workspace_bytes
from edgetune.program.xnnpack import read_delegate, resize

_CACHE_UPDATE = "update_cache"  # executorch's kernel that writes keys or values into a cache
_PORTABLE_BYTES = {"BYTE": 1, "CHAR": 1, "BOOL": 1, "SHORT": 2, "HALF": 2, "BFLOAT16": 2, "LONG": 8, "DOUBLE": 8}
_PORTABLE_DTYPES: dict[str, DType] = {"HALF": "fp16", "BFLOAT16": "bf16", "CHAR": "int8", "BYTE": "int8"}


@dataclass(frozen=True)
class Execution:
    """What the runtime does in one call: every operator, in order, and the memory that XNNPACK needs between them."""

    operators: tuple[Operator, ...] = ()
    workspace_bytes: int = 0


def executed_operators(data: bytes, method: str = "forward") -> tuple[Operator, ...]:
    """Every operator that the runtime executes in one call of `method`. Takes and raises what `execution_of` does."""
    return execution_of(data, method).operators


def execution_of(
    data: bytes,
    method: str = "forward",
    modules: Sequence[str | dict[int, str]] = (),
    dynamic: tuple[int, int] | None = None,
) -> Execution:
    """What one call of `method` executes; sizes at their upper bounds.

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
            tensor.sizes = list(resize(tensor.sizes or (), dynamic))
    calls = list(_instructions(plan))
    named = modules if len(modules) == len(calls) else [""] * len(calls)
    operators: list[Operator] = []
    workspace = 0
    for instruction, module in zip(calls, named, strict=True):
        if hasattr(instruction, "op_index"):
            operators.append(_portable(plan, instruction, module if isinstance(module, str) else ""))
            continue
        delegate = plan.delegates[instruction.delegate_index]
        payload = _payload(program, data, base, delegate)
        handles = module if isinstance(module, dict) else {}
        if delegate.id == "XnnpackBackend":
            own = read_delegate(payload, handles, dynamic)
            operators += own.operators
            workspace = max(workspace, workspace_bytes(own))
        else:
            operators.append(_opaque(plan, instruction, delegate, len(payload)))
    return Execution(tuple(operators), workspace)


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
        dtype="int8" if "quantized_sdpa" in name else _PORTABLE_DTYPES.get(scalar, "fp32"),
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
