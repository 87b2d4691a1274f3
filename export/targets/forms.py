"""The number formats that a captured model can have: plain floats, or one of the supported quantizations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.export import ExportedProgram

Form = Literal["fp32", "fp16", "bf16", "int8", "8da4w", "weights-only"]

_FLOATS: dict[torch.dtype, Form] = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class FormHelp:
    """A form in words, and how to convert a model to it (empty if edgetune cannot)."""

    description: str
    how_to: str


FORMS: dict[Form, FormHelp] = {
    "fp32": FormHelp("fp32", "export the model before it is quantized, in fp32"),
    "fp16": FormHelp("fp16", "convert the model: model.half()"),
    "bf16": FormHelp("bf16", "convert the model: model.bfloat16()"),
    "int8": FormHelp("static int8", "quantize it first, by int8 with this target as its `target`"),
    "8da4w": FormHelp(
        "4 or 8-bit weights with dynamic 8-bit activations", "quantize it first: et.Int4() or et.Int8Dynamic()"
    ),
    "weights-only": FormHelp("quantized weights with float activations", ""),
}


def form_of(program: ExportedProgram) -> Form:
    """The form of a captured program: its quantization, or else the type of most of its float parameters.

    Dynamic activations take precedence over static ones, and both over tables that are only stored in 8 bits.
    """
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    if any("choose_qparams" in name for name in names):
        return "8da4w"
    if any(".quantize_per" in name or "::quantize_per" in name for name in names):
        return "int8"
    if any("dequantize_" in name for name in names):
        return "weights-only"
    elements: dict[torch.dtype, int] = {}
    for tensor in program.state_dict.values():
        if tensor.is_floating_point():
            elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.numel()
    return _FLOATS.get(max(elements, key=lambda dtype: elements[dtype]), "fp32") if elements else "fp32"
