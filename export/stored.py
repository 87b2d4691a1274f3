"""Weights that torchao quantized, and which of them a target computes as eager mode does.

What is asked is what a layer's weight holds (zero points, the type of its scales, whether activations are quantized),
never the name of the setting that made it: checkpoints come with their tensors alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.capture import operators
from edgetune.core.errors import EdgetuneError, Exit, shortened
from edgetune.export.targets import Target

_MODULES = ("torchao.",)
_LINEAR = "quantize the float model by et.Int4(), or torchao's Int8DynamicActivationIntxWeightConfig with symmetric "
_FOUR = _LINEAR + "4-bit weights and weight_scale_dtype=torch.bfloat16"
_EIGHT = _LINEAR + "8-bit weights, PerAxis(0) and weight_scale_dtype=torch.float32"
_TABLE = "quantize the float table by et.Int4(), or torchao's IntxWeightOnlyConfig without scale_dtype"
_FLOAT = "export the float model, or quantize that by et.Int4() or et.Int8(): no runtime kernel reads this form"


@dataclass(frozen=True)
class Stored:
    """A layer whose quantized weight a target does not take, why, and what works."""

    module: str
    reason: str
    remedy: str


def unfit(model: nn.Module, target: Target) -> Iterator[Stored]:
    """Every layer of the model with a quantized weight that this target computes otherwise, or not at all."""
    for name, layer in model.named_modules():
        for own, parameter in layer.named_parameters(recurse=False):
            if is_quantized(parameter):
                reason, remedy = _refused(layer, own, parameter, target)
                if reason:
                    yield Stored(name, f"{type(parameter).__name__}: {reason}", remedy)


def check(model: nn.Module, target: Target) -> None:
    """Raise `EdgetuneError` (exit code 5) for such layers, before anything is lowered."""
    refused = list(unfit(model, target))
    if not refused:
        return
    first = refused[0]
    alike = [operators.shorten(one.module) for one in refused if one.reason == first.reason]
    rest = len(refused) - len(alike)
    raise EdgetuneError(
        f"{shortened(alike, 4)}: a weight in a form that target {target.name} does not compute right: {first.reason}"
        + (f"; {rest} more layers are in other such forms" if rest else ""),
        action=first.remedy,
        exit_code=Exit.EXPORT,
    )


def is_quantized(weight: Tensor) -> bool:
    """Whether a tensor is one of torchao's own kinds."""
    return type(weight).__module__.startswith(_MODULES)


def _refused(layer: nn.Module, own: str, weight: Any, target: Target) -> tuple[str, str]:
    """Why a weight is not taken, and the form that is; both empty where it is."""
    if own != "weight" or not hasattr(weight, "qdata") or not hasattr(weight, "target_dtype"):
        return (_of_another_kind(weight), _FLOAT)
    if isinstance(layer, nn.Embedding):
        return _table(weight)
    if not isinstance(layer, nn.Linear):
        return f"of {type(layer).__name__}, and quantized weights are taken of linears and embeddings only", _FLOAT
    return _linear(weight) if target.name == "xnnpack" else _plain_linear(weight, target)


def _of_another_kind(weight: Any) -> str:
    """Integers or 8-bit floats in a form of torchao's own, which needs its own kernels. Others lower by themselves."""
    if not hasattr(weight, "qdata"):
        return ""
    activations = getattr(weight, "act_quant_kwargs", None) is not None
    return f"{_dtype(weight.qdata)} weights{' and activations' if activations else ''} in a form that only torchao runs"


def _linear(weight: Any) -> tuple[str, str]:
    """What XNNPACK computes: dynamic 8-bit activations; 4 bits with scales of bf16, or others per output in fp32."""
    four = _dtype(weight.target_dtype) == "int4"
    remedy = _FOUR if four else _EIGHT
    if weight.activation_quantization is None:
        return "weights alone are quantized, which XNNPACK reads as another format", remedy
    if weight.activation_quantization != "int8_asym_per_token":
        return f"activations by {weight.activation_quantization}", remedy
    if bool(weight.zero_point.any()):
        return "asymmetric, and XNNPACK drops the zero points", remedy
    group = weight.block_size[-1]
    if group != weight.shape[-1] and not four:
        return f"{_dtype(weight.target_dtype)} in groups, which XNNPACK takes in 4 bits only", remedy
    if group != weight.shape[-1] and group % 32:
        return f"groups of {group}, and XNNPACK takes multiples of 32", remedy
    if four and not torch.equal(weight.scale.float(), weight.scale.to(torch.bfloat16).float()):
        return f"scales in {_dtype(weight.scale.dtype)}, which XNNPACK rounds to bf16", remedy
    if not four and weight.scale.dtype != torch.float32:
        return f"scales in {_dtype(weight.scale.dtype)}, which XNNPACK reads as fp32", remedy
    return "", ""


def _table(weight: Any) -> tuple[str, str]:
    """What the kernels of tables read: scales as wide as what they return."""
    if weight.scale.dtype != weight.dtype:
        wide, narrow = _dtype(weight.dtype), _dtype(weight.scale.dtype)
        return f"scales in {narrow} of a table that returns {wide}, which the kernel reads as {wide}", _TABLE
    return "", ""


def _plain_linear(weight: Any, target: Target) -> tuple[str, str]:
    """What portable kernels compute; of other backends nothing is known to be wrong."""
    if target.name == "portable" and weight.activation_quantization is not None:
        return "dynamic activations, for which only XNNPACK has kernels", "export it for target='xnnpack'"
    return "", ""


def _dtype(dtype: Any) -> str:
    return str(getattr(dtype, "dtype", dtype)).removeprefix("torch.")
