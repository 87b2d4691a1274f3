"""Find weights quantized by torchao that a target does not compute as eager mode does.

A weight is judged by its tensors (zero points, the type of its scales, whether activations are quantized), not by the
setting that made it: checkpoints store only tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgetune.capture import operators
from edgetune.core.errors import EdgetuneError, Exit, truncate_list
from edgetune.export.targets.target import Target

_MODULES = ("torchao.",)
_LINEAR = "or torchao's Int8DynamicActivationIntxWeightConfig with symmetric "
_FOUR = f"quantize the float model by et.Int4(), {_LINEAR}4-bit weights and weight_scale_dtype=torch.bfloat16"
_EIGHT = (
    f"quantize the float model by et.Int8Dynamic(), {_LINEAR}8-bit weights, PerAxis(0) and "
    "weight_scale_dtype=torch.float32"
)
_TABLE = "quantize the float table by et.Int4(), or torchao's IntxWeightOnlyConfig without scale_dtype"
_FLOAT = "export the float model, or quantize that by et.Int4() or et.Int8(): no runtime kernel reads this format"


@dataclass(frozen=True)
class UnsupportedLayer:
    """A layer with a quantized weight that a target does not support, the reason, and a remedy."""

    module: str
    reason: str
    remedy: str


def unsupported_layers(model: nn.Module, target: Target) -> Iterator[UnsupportedLayer]:
    """Every layer with a quantized weight that this target computes differently, or not at all."""
    for name, layer in model.named_modules():
        for key, parameter in layer.named_parameters(recurse=False):
            if type(parameter).__module__.startswith(_MODULES):
                reason, remedy = _explain(layer, key, parameter, target)
                if reason:
                    yield UnsupportedLayer(name, f"{type(parameter).__name__}: {reason}", remedy)


def check(model: nn.Module, target: Target) -> None:
    """Raise `EdgetuneError` (exit code 5) for unsupported layers."""
    refused = list(unsupported_layers(model, target))
    if not refused:
        return
    first = refused[0]
    same = [operators.shorten(layer.module) for layer in refused if layer.reason == first.reason]
    rest = len(refused) - len(same)
    raise EdgetuneError(
        f"{truncate_list(same, 4)}: target {target.name} computes this weight format wrongly: {first.reason}"
        + (f"; {rest} more layers have other unsupported formats" if rest else ""),
        action=first.remedy,
        exit_code=Exit.EXPORT,
    )


def _explain(layer: nn.Module, key: str, weight: Any, target: Target) -> tuple[str, str]:
    """Why a weight is not supported, and the format that is; both empty for a supported one."""
    if key != "weight" or not hasattr(weight, "qdata") or not hasattr(weight, "target_dtype"):
        return (_explain_other(weight), _FLOAT)
    if isinstance(layer, nn.Embedding):
        return _explain_table(weight)
    if not isinstance(layer, nn.Linear):
        return f"in {type(layer).__name__}; only linears and embeddings may have quantized weights", _FLOAT
    return _explain_xnnpack_linear(weight) if target.name == "xnnpack" else _explain_linear(weight, target)


def _explain_other(weight: Any) -> str:
    """Integers or 8-bit floats in a format that needs torchao's kernels; other formats lower as they are."""
    if not hasattr(weight, "qdata"):
        return ""
    activations = getattr(weight, "act_quant_kwargs", None) is not None
    return (
        f"{_dtype(weight.qdata)} weights{' and activations' if activations else ''} in a format that only torchao runs"
    )


def _explain_xnnpack_linear(weight: Any) -> tuple[str, str]:
    """XNNPACK computes dynamic 8-bit activations; 4 bits with bf16 scales, or more per output channel in fp32."""
    four = _dtype(weight.target_dtype) == "int4"
    remedy = _FOUR if four else _EIGHT
    if weight.activation_quantization is None:
        return "weights alone are quantized, which XNNPACK reads as another format", remedy
    if weight.activation_quantization != "int8_asym_per_token":
        return f"activations are quantized as {weight.activation_quantization}", remedy
    if bool(weight.zero_point.any()):
        return "asymmetric, and XNNPACK drops the zero points", remedy
    group = weight.block_size[-1]
    if group != weight.shape[-1] and not four:
        return f"{_dtype(weight.target_dtype)} in groups, which XNNPACK takes in 4 bits only", remedy
    if four and group % 32:
        return f"groups of {group}, and XNNPACK takes multiples of 32", remedy
    if four and not torch.equal(weight.scale.float(), weight.scale.to(torch.bfloat16).float()):
        return f"scales in {_dtype(weight.scale.dtype)}, which XNNPACK rounds to bf16", remedy
    if not four and weight.scale.dtype != torch.float32:
        return f"scales in {_dtype(weight.scale.dtype)}, which XNNPACK reads as fp32", remedy
    return "", ""


def _explain_table(weight: Any) -> tuple[str, str]:
    """The kernels of embedding tables read scales in the type that they return."""
    if weight.scale.dtype != weight.dtype:
        wide, narrow = _dtype(weight.dtype), _dtype(weight.scale.dtype)
        return f"scales in {narrow} of a table that returns {wide}, which the kernel reads as {wide}", _TABLE
    return "", ""


def _explain_linear(weight: Any, target: Target) -> tuple[str, str]:
    """Portable kernels have no dynamic activations; of other backends no wrong format is known."""
    if target.name == "portable" and weight.activation_quantization is not None:
        return "dynamic activations, for which only XNNPACK has kernels", "export it for target='xnnpack'"
    return "", ""


def _dtype(dtype: Any) -> str:
    return str(getattr(dtype, "dtype", dtype)).removeprefix("torch.")
