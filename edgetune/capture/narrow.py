"""Convert a model to 16-bit floats such that it is called as before: it takes and returns the types of the fp32 model.

Some layers stay in fp32, with a conversion before and after each: in bf16, convolutions, batch norms and linears with
8-bit weights, which XNNPACK has in fp32 and fp16 only; and quantized tables, whose kernels read scales in the type that
they return. A quantized head returns fp32: logits with 8 bits of mantissa would make several tokens equally likely.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edgetune.core.errors import EdgetuneError, Exit, truncate_list
from edgetune.core.floats import FloatType

TORCH_DTYPES: dict[FloatType, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_WITHOUT_BF16 = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)
# Angles of a position grow with it: rounded to 8 bits, they are wrong from a few hundred tokens on.
_ROTARY = "inv_freq"


def narrow(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` that computes in `dtype`, takes fp32 where `model` does, and returns fp32.

    Raises `EdgetuneError` (exit code 5) if most of the weights would stay in fp32.
    """
    copied = copy.deepcopy(model)
    heads = {id(head) for m in copied.modules() if (head := _head(m)) is not None}
    wide: set[int] = set()  # the storages of weights that stay as they are
    for module in copied.modules():
        if _stays_wide(module, dtype):
            wide |= {id(tensor) for tensor in _tensors(module)}
            keep_wide(module, None if id(module) in heads else dtype)
        elif _is_quantized(module):
            _retype(module, dtype)
    _check_share(copied, wide)
    for module in copied.modules():
        _convert(module, wide, dtype)
    copied.register_forward_pre_hook(lambda _module, args: _cast(args, torch.float32, dtype))
    copied.register_forward_hook(lambda _module, _args, output: _cast(output, dtype, torch.float32))
    return copied


def keep_wide(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Let a layer take and compute fp32 inside a model in `dtype`; `None`: it returns fp32 as well."""
    module.register_forward_pre_hook(lambda _module, args: _cast(args, None, torch.float32))
    if dtype is not None:
        module.register_forward_hook(lambda _module, _args, output: _cast(output, torch.float32, dtype))


def _head(module: nn.Module) -> nn.Module | None:
    """The output layer of a language model of transformers."""
    getter = getattr(module, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return head if isinstance(head, nn.Module) and _is_quantized(head) else None


def _stays_wide(module: nn.Module, dtype: torch.dtype) -> bool:
    if not _is_quantized(module):
        return dtype == torch.bfloat16 and isinstance(module, _WITHOUT_BF16)
    eight = getattr(module.weight, "target_dtype", None) == torch.int8
    return isinstance(module, nn.Embedding) or (dtype == torch.bfloat16 and eight)


def _is_quantized(module: nn.Module) -> bool:
    return type(getattr(module, "weight", None)).__module__.startswith("torchao")


def _retype(module: nn.Module, dtype: torch.dtype) -> None:
    """Let a quantized weight be computed in `dtype`. Its scales stay: XNNPACK reads them in one type only."""
    weight: Any = module.weight
    if not hasattr(weight, "qdata") or not hasattr(weight, "target_dtype"):
        return  # a format that the export refuses
    parts = (weight.qdata, weight.scale, weight.zero_point, weight.target_dtype, weight.block_size, dtype)
    module.weight = nn.Parameter(type(weight)(*parts, weight.activation_quantization), requires_grad=False)


def _convert(module: nn.Module, wide: set[int], dtype: torch.dtype) -> None:
    for tensor in _tensors(module):
        if id(tensor) not in wide and tensor.dtype == torch.float32 and type(tensor.data) is Tensor:
            tensor.data = tensor.data.to(dtype)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of this module itself, without the angles of rotary embeddings."""
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)
    yield from (b for name, b in module._buffers.items() if b is not None and not name.endswith(_ROTARY))


def _check_share(model: nn.Module, wide: set[int]) -> None:
    """Raise if more than half of the floating-point weights stay in fp32."""
    held = [(m, tensor) for m in model.modules() for tensor in _tensors(m) if type(tensor.data) is Tensor]
    floats = {id(t): (m, t) for m, t in held if t.dtype == torch.float32}
    elements = sum(t.numel() for _, t in floats.values())
    kept = [(m, t) for key, (m, t) in floats.items() if key in wide]
    share = sum(t.numel() for _, t in kept) / max(elements, 1)
    if share > 0.5:
        kinds = sorted({type(module).__name__ for module, _ in kept})
        raise EdgetuneError(
            f"in bf16, {100 * share:.0f} % of the weights would stay in fp32: there is no kernel in bf16 for "
            f"{truncate_list(kinds, 4)}",
            action="export it with dtype: fp16, or leave dtype out",
            exit_code=Exit.EXPORT,
        )


def _cast(values: Any, before: torch.dtype | None, after: torch.dtype) -> Any:
    """The values with every tensor of type `before` in `after`; `None`: every floating-point tensor."""

    def cast(value: Tensor) -> Tensor:
        chosen = value.is_floating_point() if before is None else value.dtype == before
        return value.to(after) if chosen else value

    return pytree.tree_map_only(Tensor, cast, values)
