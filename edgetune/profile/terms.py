"""The terms that the time of one operator is linear in: its sizes, rounded up to the tiles of its kernel.

    microseconds = sum over terms of (size x microseconds per unit), with positive rates

A product of M x K by K x N, computed in tiles, has the terms M N K (padded to whole tiles), M N, M K and N K. M N K
over the sum is an efficiency that rises with each of the sizes, as it does on real kernels. The rates are fitted to
timed programs (`edgetune.profile.fit`), one set for each curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from edgetune.profile.facts import StrictRecord
from edgetune.program.operators import Operator

PRODUCTS = frozenset({"conv", "pointwise-conv", "linear", "matmul"})
TRAFFIC = "traffic"  # beyond a cache, whose rates are the machine's and not a kernel's
WEIGHTS_NEAR, WEIGHTS_FAR = "weights from the last level", "weights from memory"
ACTIVATIONS_NEAR = "activations from the last level"
CALL, DELEGATE = "call", "delegate call"
VECTOR = 16  # channels that a depthwise kernel or a reduction processes at once
DEPTH = 8  # products that an 8-bit kernel adds at once
LONG = 256  # row length from which ExecuTorch's layer norm takes half the time per value
SIDE_BYTES = 32  # of the square blocks of a transpose
_WIDTHS: dict[str, int] = {"int8": 1, "fp16": 2, "bf16": 2}
_K, _M = 1e3, 1e6
_KEPT, _LOST = 1.0, 3.0  # bytes moved by a run, in sizes of a cache, that leave all of the weights in it, and none


class KernelTile(StrictRecord):
    """Rows and columns of a product that one call of the innermost kernel computes."""

    rows: int = Field(ge=1, le=64)
    columns: int = Field(ge=1, le=256)


SINGLE = KernelTile(rows=1, columns=1)  # of a type whose products were not timed


@dataclass(frozen=True)
class CacheSizes:
    """Bytes of the second-level cache of one core, and of the last level."""

    near_bytes: float
    last_bytes: float


Key = tuple[str, str]  # curve, term


def curve_of(operator: Operator) -> str:
    """The curve of an operator, shared by all that run the same kernel: name, variant and type."""
    name = operator.operator
    if name.endswith(".conv2d"):
        if operator.window == 1 and operator.groups == 1:
            name = "xnnpack.fully-connected"  # XNNPACK's own choice
        else:
            name += " grouped" if operator.groups > 1 else " spatial"
    elif operator.kind == "depthwise-conv":
        name += f" {_depthwise_kernel(operator)}"
    elif operator.kind == "reduction" and operator.delegated:
        name += " of rows" if operator.columns == 1 else " of images"
    elif name.startswith("aten.native_layer_norm"):
        name += " short" if operator.columns < LONG else " long"
    return f"{name} {operator.dtype}"


def family_of(curve: str) -> str:
    """The same kernel in any type: `xnnpack.add int8` -> `xnnpack.add`."""
    return curve.rsplit(" ", 1)[0]


def is_product(operator: Operator) -> bool:
    """Whether it is a matrix product, convolutions included."""
    return operator.macs > 0 and operator.kind in PRODUCTS


def wide_window(operator: Operator) -> bool:
    """Whether a depthwise window exceeds XNNPACK's kernels (25), so that it runs as a product per channel."""
    return operator.kind == "depthwise-conv" and operator.window > 25


def _depthwise_kernel(operator: Operator) -> str:
    """The kernel of a depthwise convolution, by the most values under its window: XNNPACK pads to that."""
    if wide_window(operator):
        return "wide"
    if operator.window <= 4 and operator.dtype != "int8":
        return "4"
    return "9" if operator.window <= 9 else "25"


def columns_of(operator: Operator) -> int:
    """Contiguous values of its output, at least one; for a depthwise convolution, its channels."""
    return operator.columns or (operator.output_shape[-1] if operator.output_shape else 1) or 1


def terms_of(operator: Operator, tile: KernelTile) -> dict[str, float]:
    """The terms of one operator: thousands of values, for products millions of multiply-accumulates."""
    elements = math.prod(operator.output_shape) if operator.output_shape else 1
    columns = columns_of(operator)
    if is_product(operator):
        return _product(operator, elements, columns, tile)
    if wide_window(operator):
        return _wide_depthwise(operator, elements, columns, tile)
    if operator.kind == "depthwise-conv":
        places = elements / columns
        vectors = places * up(columns, VECTOR)
        return {"1": 1, "places": places / _K, "vectors": vectors / _K, "weights": operator.weight_bytes / _K}
    if operator.kind == "reduction" and operator.delegated:
        if operator.columns == 1:
            return {"1": 1, "rows": elements / _K, "vectors": elements * up(operator.window, VECTOR) / _K}
        places = elements * operator.window / columns
        return {"1": 1, "places": places / _K, "vectors": places * up(columns, VECTOR) / _K}
    if operator.kind in ("softmax", "normalization"):
        read = operator.activation_bytes / 8
        return {"1": 1, "values": read / _K, "rows": read / columns / _K}
    if operator.kind == "pooling":
        windows = {"places": elements / columns / _K, "windows": elements * operator.window / _K}
        return {"1": 1, **windows, "bytes": operator.activation_bytes / _K}
    if operator.kind == "data-movement":
        if operator.window > 1:  # a transpose that leaves nothing contiguous
            side = SIDE_BYTES // _WIDTHS.get(operator.dtype, 4)
            squares = up(columns, side) * up(operator.window, side)
            return {"1": 1, "tiles": elements / (columns * operator.window) * squares / _K}
        if columns >= elements:
            return {"1": 1, "values": elements / _K}
        return {"1": 1, "values": elements / _K, "rows": elements / columns / _K}
    return {"1": 1, "values": elements / _K, "bytes": operator.activation_bytes / _K}


def _wide_depthwise(operator: Operator, elements: int, channels: int, tile: KernelTile) -> dict[str, float]:
    """A product per channel, which uses one column of a tile."""
    rows = up(max(elements // channels, 1), tile.rows)
    deep = DEPTH if operator.dtype == "int8" else 1
    return {
        "1": 1,
        "macs": channels * rows * tile.columns * operator.window * deep / _M,
        "channels": channels / _K,
    }


def _product(operator: Operator, elements: int, columns: int, tile: KernelTile) -> dict[str, float]:
    groups, depth = operator.groups, operator.macs / max(elements, 1)
    wide = DEPTH if operator.dtype == "int8" else 1
    full = operator.window * up(round(depth / operator.window), wide)
    rows = max(elements // (columns * groups), 1)
    padded_rows = 1 if rows == 1 else up(rows, tile.rows)  # one row has its own kernel
    whole = groups * padded_rows * up(columns, tile.columns) * full
    # One row reads each weight for one product, one column uses one in a vector of products: other rates, which what
    # is read once for each product grows with.
    name = "one row" if rows == 1 else "one column" if columns == 1 else "macs"
    terms = {"1": 1.0, name: whole / _M, "written": groups * rows * columns / _K}
    if name != "one column":
        terms["read"] = groups * rows * depth / _K
    if name != "one row":
        terms["packed"] = groups * columns * depth / _K
    return terms


def traffic_terms(operator: Operator, moved_bytes: float, caches: CacheSizes) -> dict[str, float]:
    """Thousands of bytes from beyond the caches: weights that do not stay there from one run to the next, and large
    activations.

    `moved_bytes`: of the whole program (`moved_bytes`).
    """
    terms: dict[str, float] = {}
    if operator.weight_bytes:
        for term, holds in ((WEIGHTS_NEAR, caches.near_bytes), (WEIGHTS_FAR, caches.last_bytes)):
            missed = min(max((moved_bytes / holds - _KEPT) / (_LOST - _KEPT), 0.0), 1.0)
            if missed > 0:
                terms[term] = missed * operator.weight_bytes / _K
    beyond = operator.activation_bytes - caches.near_bytes / 2
    if beyond > 0:
        terms[ACTIVATIONS_NEAR] = beyond / _K
    return terms


def moved_bytes(operators: Sequence[Operator]) -> float:
    """Bytes that one run of a program reads and writes: what lies between two uses of a weight."""
    return float(sum(operator.weight_bytes + operator.activation_bytes for operator in operators))


def delegate_calls_of(operators: Sequence[Operator]) -> int:
    """Runs of delegated operators in program order: each is at least one call of the backend."""
    before = [False, *(operator.delegated for operator in operators)]
    return sum(1 for last, operator in zip(before, operators, strict=False) if operator.delegated and not last)


def footprint_bytes(operators: Sequence[Operator]) -> float:
    """Bytes of constants that one run of a program reads."""
    return float(sum(operator.weight_bytes for operator in operators))


def up(size: int, step: int) -> int:
    """The least multiple of `step` that is not below `size`."""
    return -(-size // step) * step
