"""Integers next to floating-point tensors, as floats: executorch makes each an int64 tensor and a conversion.

It folds both again where it writes the program, but until then they are operators outside of the backend.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export import ExportedProgram

_ATEN = torch.ops.aten
_BINARY = (
    _ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.mul.Tensor, _ATEN.div.Tensor, _ATEN.add.Scalar, _ATEN.sub.Scalar,
    _ATEN.mul.Scalar, _ATEN.div.Scalar, _ATEN.rsub.Scalar,
)  # fmt: skip


def as_floats(program: ExportedProgram) -> None:
    """Write `x + 1` as `x + 1.0` where `x` is in floating point."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.target in _BINARY and isinstance(value, Tensor) and value.dtype.is_floating_point:
            node.args = tuple(float(arg) if type(arg) is int else arg for arg in node.args)
