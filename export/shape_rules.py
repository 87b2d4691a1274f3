"""Infer the shapes of torchao's quantized operators without computing them.

While a graph is traced, its tensors are fake: they have shapes, and no values. torchao's operators are composed of a
dozen others, and every trace ran all of those on fake tensors for each quantized layer: two fifths of an export.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_TORCHAO = "torchao.quantization.quant_primitives"


@contextmanager
def infer_shapes() -> Iterator[None]:
    """Inside, torchao's operators on fake tensors, while nothing records them, only make the tensors they return."""
    if _TORCHAO not in sys.modules:  # nothing is quantized by it
        yield
        return
    with torch.library._scoped_library("torchao", "FRAGMENT") as library, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s)Warning only once.*Overriding a previously registered kernel")
        for rule in (quantize_affine, dequantize_affine, choose_qparams_affine):
            operator = getattr(torch.ops.torchao, rule.__name__).default
            library.impl(
                rule.__name__, _infer_if_fake(operator, rule), "CompositeImplicitAutograd", allow_override=True
            )
        yield


def _infer_if_fake(operator: Any, rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule for fake tensors, else what torchao computes."""
    from torch._inductor.decomposition import decompositions  # torchao's own functions are registered there
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    compute = decompositions[operator]

    def call(values: Any, *args: Any, **settings: Any) -> Any:
        infer = type(values) is FakeTensor and get_proxy_mode() is None
        return (rule if infer else compute)(values, *args, **settings)

    return call


def quantize_affine(
    values: Tensor, block_size: Sequence[int], scale: Tensor, zero_point: Any, output_dtype: torch.dtype, *limits: Any
) -> Tensor:
    """Integers as many as the values; those of fewer than 8 bits, without sign, are stored in 8."""
    narrow = output_dtype in sys.modules[_TORCHAO]._SUB_BYTE_UINT_BOUNDS
    return values.new_empty(values.shape, dtype=torch.uint8 if narrow else output_dtype)


def dequantize_affine(
    values: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Any,
    input_dtype: torch.dtype,
    quant_min: Any = None,
    quant_max: Any = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Numbers as many as the values."""
    return values.new_empty(values.shape, dtype=output_dtype)


def choose_qparams_affine(
    values: Tensor,
    mapping_type: str,
    block_size: Sequence[int],
    target_dtype: torch.dtype,
    quant_min: Any = None,
    quant_max: Any = None,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    zero_point_dtype: torch.dtype | None = None,
    keepdim: bool = False,
) -> tuple[Tensor, Tensor]:
    """A scale and a zero point for each block."""
    sizes, reduced = sys.modules[_TORCHAO]._get_reduction_params(block_size, values.shape)
    if keepdim:
        shape = [size // block for size, block in zip(values.shape, block_size, strict=True)]
    else:
        shape = [size for axis, size in enumerate(sizes) if axis not in reduced]
    scale_dtype = values.dtype if scale_dtype is None else scale_dtype
    if zero_point_dtype is None:
        zero_point_dtype = torch.int32 if mapping_type == "ASYMMETRIC" else values.dtype
    return values.new_empty(shape, dtype=scale_dtype), values.new_empty(shape, dtype=zero_point_dtype)
