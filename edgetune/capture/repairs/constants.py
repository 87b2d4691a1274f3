"""Weights that the forward pass computes from other weights: compute them once, here.

A backend takes a layer only if its weight is a constant of the program. Standardized weights, position biases looked up
in a table and the angles of rotary embeddings are constants that the graph still computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from edgetune.core.quiet import silence_libraries

_MOST_BYTES = 2**20  # larger constants are not folded if they are larger than their sources
_CLONE, _PLAIN = torch.ops.aten.clone.default, {"memory_format": torch.contiguous_format}
_NEVER = ("quantize", "dequantize", "choose_qparams", "full", "expand", "repeat", "zeros", "ones", "empty")


def fold(program: ExportedProgram) -> None:
    """Replace what depends only on constants by its value, unless the program would grow."""
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    copies = [node for node in program.graph.nodes if node.target == _CLONE and dict(node.kwargs) == _PLAIN]
    for node in copies:  # without a memory format, which the pass does not fold
        node.target, node.kwargs = torch.ops.aten.contiguous.default, {}
    with silence_libraries():
        constant_prop_pass(program, custom_skip_targets=_operators_to_keep(program.graph))
    for node in program.graph.nodes:
        if node in copies:
            node.target, node.kwargs = _CLONE, _PLAIN


def own_memory(program: ExportedProgram) -> None:
    """Copy each constant that is a part of a larger one.

    XNNPACK's compiler (executorch 1.4 and 1.5) writes a constant from the start of its storage: for a slice, such as
    the key and value projections in torch's attention, it silently writes the wrong values.
    """
    for holder in (program.state_dict, program.constants):
        for name, value in holder.items():
            if type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and _is_part(value):
                own = value.detach().clone(memory_format=torch.contiguous_format)
                holder[name] = nn.Parameter(own, value.requires_grad) if isinstance(value, nn.Parameter) else own


def _is_part(value: Tensor) -> bool:
    return value.storage_offset() != 0 or value.untyped_storage().nbytes() != value.numel() * value.element_size()


def _operators_to_keep(graph: fx.Graph) -> set[Any]:
    """The operators that stay: quantization, random numbers, and those that would give a large constant."""
    kept = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = str(node.target)
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        grows = _bytes(node) > max(_MOST_BYTES, sum(_bytes(source) for source in node.all_input_nodes))
        if random or grows or any(word in name for word in _NEVER):
            kept.add(node.target)
    return kept


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape):
        return 0
    return value.numel() * value.element_size()
