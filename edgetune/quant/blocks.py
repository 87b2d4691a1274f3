"""Quantize and unpack a weight a few rows at a time.

Rounding writes half a dozen temporaries as large as the weight: gigabytes for a head over a large vocabulary. Those of
a block of rows stay in the processor's cache, which is also about twice as fast. The values are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgetune.core.quiet import silence_libraries
from edgetune.quant.rounding import Codes, Grid, Rule, absmax_codes, round_to_grid

BLOCK_VALUES = 2**21  # 8 MiB in float32


@torch.no_grad()
def quantize_weight(weight: Tensor, grid: Grid, rule: Rule = absmax_codes, *, rounds_activations: bool) -> nn.Parameter:
    """A weight `(out, in)` in integers, as the tensor of torchao that the export lowers.

    `rule` rounds a block of rows, unless it lies on the grid. `rounds_activations`: a linear rounds what it multiplies
    to 8 bits for each token.
    """
    rounded = round_by_rows(weight.detach(), grid, rule)
    return pack_codes(rounded, grid, weight.dtype, rounds_activations=rounds_activations)


def pack_codes(rounded: Codes, grid: Grid, dtype: torch.dtype, *, rounds_activations: bool) -> nn.Parameter:
    """A rounded weight as the tensor of torchao, which computes in `dtype`."""
    with silence_libraries():
        from torchao.quantization import IntxUnpackedToInt8Tensor

    tensor = IntxUnpackedToInt8Tensor(
        rounded.codes,
        rounded.scales,
        torch.zeros_like(rounded.scales, dtype=torch.int8),
        getattr(torch, f"int{grid.bits}"),
        (1, grid.inputs_per_scale(rounded.codes.shape[1])),
        dtype,
        "int8_asym_per_token" if rounds_activations else None,
    )
    return nn.Parameter(tensor, requires_grad=False)


def round_by_rows(weight: Tensor, grid: Grid, rule: Rule) -> Codes:
    """Codes and scales of a weight `(out, in)`; `rule` rounds a block of rows, unless it lies on the grid."""
    rounded = [round_to_grid(block, grid, rule) for block in torch.split(weight, _rows(weight))]
    codes, scales = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*rounded, strict=True))
    return Codes(codes, scales)


@contextmanager
def unpack_by_rows(model: nn.Module) -> Iterator[None]:
    """Inside, large quantized layers unpack a few rows of their weight at a time, and tables those looked up."""
    kinds = {nn.Linear: _multiply_by_rows, nn.Embedding: _look_up_rows}
    layers: list[Any] = [layer for layer in model.modules() if type(layer) in kinds and _is_large(layer.weight)]
    for layer in layers:
        layer.forward = partial(kinds[type(layer)], layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _multiply_by_rows(layer: nn.Linear, values: Tensor) -> Tensor:
    weights = _split_rows(layer.weight)
    biases = [None] * len(weights) if layer.bias is None else torch.split(layer.bias, _rows(layer.weight))
    return torch.cat([F.linear(values, w, b) for w, b in zip(weights, biases, strict=True)], -1)


def _look_up_rows(table: Any, ids: Tensor) -> Tensor:
    weight = table.weight
    tensors = [getattr(weight, name)[ids.flatten()] for name in weight.tensor_data_names]
    rows: Tensor = _like(weight, tensors).dequantize().view(*ids.shape, -1)
    return rows


def _is_large(weight: Any) -> bool:
    return hasattr(weight, "qdata") and hasattr(weight, "target_dtype") and weight.numel() > BLOCK_VALUES


def _rows(weight: Tensor) -> int:
    return max(1, BLOCK_VALUES // weight.shape[1])


def _split_rows(weight: Any) -> list[Tensor]:
    tensors = [getattr(weight, name).split(_rows(weight)) for name in weight.tensor_data_names]
    return [_like(weight, block) for block in zip(*tensors, strict=True)]


def _like(weight: Any, tensors: Any) -> Any:
    """A weight with the settings of this one."""
    settings = {name: getattr(weight, name) for name in weight.tensor_attribute_names}
    return type(weight)(**dict(zip(weight.tensor_data_names, tensors, strict=True)), **settings)
