"""One record for each operator of an exported program, as the cost predictor reads them."""

from __future__ import annotations

from typing import Literal

from edgetune.program.program_files import Record

Kind = Literal[
    "conv", "pointwise-conv", "depthwise-conv", "linear", "matmul", "embedding",
    "normalization", "softmax", "elementwise", "reduction", "pooling", "data-movement", "other",
]  # fmt: skip
DType = Literal["fp32", "fp16", "bf16", "int8", "8da4w"]


class Operator(Record):
    """One operator: what it computes, in which type, how much it multiplies and how many bytes it moves."""

    operator: str  # "aten.linear.default"
    module: str  # dotted path in the user's model, "" when unknown
    kind: Kind
    dtype: DType
    output_shape: tuple[int, ...]
    macs: int  # multiply-accumulates
    weight_bytes: int  # constants read, as stored
    activation_bytes: int  # inputs read plus outputs written
    delegated: bool  # whether a backend runs it; False: a portable kernel
    columns: int = 0  # of a product in one group, of a copy the values that stay contiguous; 0: unknown
    groups: int = 1  # separate products: groups of a convolution, batches of a matmul
    window: int = 1  # values read per value written; of a transpose those no longer contiguous
