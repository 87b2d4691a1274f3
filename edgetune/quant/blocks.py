"""Quantize and unpack a weight a few rows at a time.

torchao writes half a dozen temporaries as large as the weight: gigabytes for a head over a large vocabulary. Those of a
block of rows stay in the processor's cache, which is also about twice as fast. The values are the same.
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

BLOCK_VALUES = 2**21  # 8 MiB in float32


def quantize_layer(layer: Any, config: Any) -> None:
    """Quantize the weight `(out, in)` of this one layer by torchao.

    Layers that share a weight each read it in floating point, and end with a weight of their own.
    """
    blocks = layer.weight.detach().split(_rows(layer.weight))
    layer.weight = nn.Parameter(blocks[0], requires_grad=False)  # torchao then also shows the type in `repr(layer)`
    first = _quantize(layer, config)
    if len(blocks) == 1:
        return
    rows = sum(len(block) for block in blocks)
    tensors = {name: getattr(first, name) for name in first.tensor_data_names}
    whole = {name: tensor.new_empty(rows, *tensor.shape[1:]) for name, tensor in tensors.items()}
    start = 0
    for block in blocks:
        quantized = first if start == 0 else _quantize_block(layer, block, config)
        for name, tensor in whole.items():
            tensor[start : start + len(block)] = getattr(quantized, name)
        start += len(block)
    layer.weight = nn.Parameter(_like(first, whole.values()), requires_grad=False)


def _quantize_block(layer: nn.Module, block: Tensor, config: Any) -> Any:
    part: Any = (nn.Linear if isinstance(layer, nn.Linear) else nn.Embedding)(1, 1, device="meta")
    part.weight = nn.Parameter(block, requires_grad=False)
    weight = _quantize(part, config)
    del part.weight  # torchao leaves a cycle of references in each module
    return weight


def _quantize(layer: Any, config: Any) -> Any:
    from torchao.quantization import quantize_

    with silence_libraries():
        quantize_(layer, config, filter_fn=lambda module, _: module is layer)
    return layer.weight


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
