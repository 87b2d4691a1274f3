"""A weight that a layer packs and another operator reads.

XNNPACK packs a layer's weight and bias when it loads a program, and frees the original. Another operator of the same
delegate that reads the same constant then reads freed memory and crashes (executorch 1.4 and 1.5). It gets a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from edgetune.capture.operators import constants_of

_ATEN = torch.ops.aten
_PACKING: dict[Any, tuple[int, ...]] = {  # the packed arguments
    _ATEN.linear.default: (1, 2), _ATEN.addmm.default: (0, 2), _ATEN.mm.default: (1,), _ATEN.prelu.default: (1,),
    _ATEN._prelu_kernel.default: (1,), _ATEN.convolution.default: (1, 2), _ATEN.conv1d.default: (1, 2),
    _ATEN.conv2d.default: (1, 2), _ATEN.conv_transpose2d.input: (1, 2),
}  # fmt: skip
_NEVER = ("gather", "permute", "transpose", "t", "view")


def part(program: ExportedProgram) -> None:
    """Give other readers of a packed constant a copy of it."""
    from executorch.backends.transforms.utils import create_constant_placeholder

    graph, constants = program.graph, constants_of(program)
    for node in [node for node in graph.nodes if node.op == "placeholder" and node.name in constants]:
        name = constants[node.name]
        data = program.state_dict.get(name, program.constants.get(name))
        readers = [user for user in node.users if not _packs(user, node) and not _is_apart(user)]
        if not readers or not any(_packs(user, node) for user in node.users):
            continue
        assert isinstance(data, torch.Tensor)
        with graph.inserting_before(node):
            copy = create_constant_placeholder(
                program, graph, f"{node.name}_by_value", InputKind.BUFFER, data.detach().clone(), persistent_buffer=True
            )
        for reader in readers:
            reader.replace_input_with(node, copy)


def _packs(reader: fx.Node, node: fx.Node) -> bool:
    return any(place < len(reader.args) and reader.args[place] is node for place in _PACKING.get(reader.target, ()))


def _is_apart(reader: fx.Node) -> bool:
    """Whether the operator is not one of XNNPACK's, or reads the constant at compile time."""
    name = str(reader.target).split(".")
    return len(name) > 1 and (name[1] in _NEVER or name[1].startswith(("embedding", "index", "quantize", "dequantize")))
