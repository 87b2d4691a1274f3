"""Peak memory of a program above an empty process: what is planned, what is packed, and what the runtime adds.

    peak = packed weights + tables + runtime + the larger of
           weights not yet freed after packing             while it is loaded
           arena + workspace + tables of pointers          while it runs

XNNPACK packs the weights of one delegate after the other. Weights of linear layers are freed one by one after packing,
so that the largest exists twice for a moment; those of convolutions are freed when the delegate is complete (measured:
a transformer's peak has its weights once and one layer twice, a convolutional network's has all of them twice). Packing
pads to 16 columns and, for 8-bit types, to a depth of 8.

It has no linear layers in bf16 on a CPU without such instructions in its build (measured on x86): it widens their
weights, packs the wide copy, and keeps all three, five times the stored bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgetune.core.numbers import MIB
from edgetune.profile.terms import DEPTH, VECTOR, columns_of, is_product, up, wide_window
from edgetune.program.operators import DType, Operator

# Fitted once to the peaks of 90 programs in fresh processes (families of models in fp32, int8 and int4).
RUNTIME_MIB = 1.1  # of ExecuTorch 1.5
_KERNEL_MIB = 0.17  # code and tables of each kind of kernel outside the delegates
_DELEGATED_KERNEL_MIB = 0.02  # of each kind and type within them
_FOUR_BIT_MIB = 0.17  # more where 4-bit weights are packed
_OPERATOR_MIB = 0.0014  # what the runtime keeps for each operator
_WORKSPACE = 0.67  # of the inputs and outputs of the largest delegated operator
_POINTER_BYTES, _ROWS = 8, 7
_WEIGHT_BYTES: dict[DType, float] = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "8da4w": 0.5}


def peak_memory_mib(
    operators: Sequence[Operator],
    plan_bytes: int = 0,
    program_bytes: int | None = None,
    workspace_bytes: int | None = None,
) -> float:
    """MiB that loading and running the program adds to an empty process.

    `program_bytes`: size of the `.pte`. Its part that is no operator's weights (instructions, embedding tables) counts
    in full, as the runtime locks it in memory; if a process may not lock so much (`ulimit -l`), only the rows that are
    looked up are paged in. `workspace_bytes`: as planned for the program (`edgetune.program.workspace`); else a part
    of the tensors of the largest operator.
    """
    delegated = [operator for operator in operators if operator.delegated]
    apart = [operator for operator in operators if not operator.delegated]
    if workspace_bytes is None:
        workspace_bytes = int(_WORKSPACE * max((operator.activation_bytes for operator in delegated), default=0))
    running = plan_bytes + workspace_bytes + sum(map(_pointers_bytes, delegated))
    total = sum(map(packed_bytes, delegated)) + max(_beside_packed_bytes(operators), running)
    total += sum(operator.weight_bytes for operator in apart)
    if program_bytes is not None:
        total += max(program_bytes - sum(operator.weight_bytes for operator in operators), 0)
    return total / MIB + _runtime_mib(delegated, apart)


def _runtime_mib(delegated: Sequence[Operator], apart: Sequence[Operator]) -> float:
    """Memory of the runtime: its code, the kernels that the program calls, and a record of each operator."""
    kinds = {(operator.operator, operator.dtype) for operator in delegated}
    four_bit = any(operator.dtype == "8da4w" for operator in delegated)
    kernels = _KERNEL_MIB * len({operator.operator for operator in apart}) + _DELEGATED_KERNEL_MIB * len(kinds)
    return RUNTIME_MIB + kernels + _FOUR_BIT_MIB * four_bit + _OPERATOR_MIB * (len(delegated) + len(apart))


def packed_bytes(operator: Operator) -> float:
    """Bytes of the weights of a delegated operator as XNNPACK lays them out."""
    if not operator.weight_bytes:
        return 0.0
    width = 4.0 if _is_widened(operator) else _WEIGHT_BYTES[operator.dtype]
    bias = 4.0 if operator.dtype in ("fp32", "fp16", "bf16") else 8.0
    deep = DEPTH if operator.dtype == "int8" else 1
    if operator.kind == "depthwise-conv":
        channels = columns_of(operator)
        if wide_window(operator):
            return channels * VECTOR * (operator.window * deep * width + bias)
        return up(channels, VECTOR) * (operator.window * width + bias)
    if not is_product(operator):
        return float(operator.weight_bytes)
    elements = max(math.prod(operator.output_shape), 1)
    columns = columns_of(operator)
    depth = round(operator.macs / elements / operator.window)
    # 4-bit weights keep their scales, whose size follows from the stored size
    scales = max(operator.weight_bytes - columns * depth * width, 0.0) if operator.dtype == "8da4w" else 0.0
    return operator.groups * up(columns, VECTOR) * (operator.window * up(depth, deep) * width + bias) + scales


def _is_widened(operator: Operator) -> bool:
    """Whether XNNPACK computes a linear layer in fp32 from a copy of its weights."""
    return operator.dtype == "bf16" and operator.operator == "xnnpack.fully-connected"


def _pointers_bytes(operator: Operator) -> float:
    """A pointer for each place and value under the window."""
    if operator.window == 1 or "conv" not in operator.kind:
        return 0.0
    columns = columns_of(operator) * (1 if operator.kind == "depthwise-conv" else operator.groups)
    places = math.prod(operator.output_shape) // columns
    return up(places, _ROWS) * operator.window * _POINTER_BYTES


def _beside_packed_bytes(operators: Sequence[Operator]) -> float:
    """Most bytes of weights that exist besides their packed copy: a delegate's convolutions and its largest layer.

    Operators outside the delegates separate one delegate from the next.
    """
    most = convolutions = largest = kept = 0
    for operator in operators:
        if not operator.delegated:
            convolutions = largest = 0
        elif _is_widened(operator):
            kept += 3 * operator.weight_bytes  # what is stored, and the copy of twice that
        elif "conv" in operator.kind:
            convolutions += operator.weight_bytes
        else:
            largest = max(largest, operator.weight_bytes)
        most = max(most, convolutions + largest)
    return float(most + kept)
