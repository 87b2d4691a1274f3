"""What a statically quantized graph still computes in floating point."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx

from edgetune.capture.operators import module_of
from edgetune.core.errors import truncate_list
from edgetune.program.operator_kinds import is_free, kind_of, short_name
from edgetune.quant.integers import CLAMPS, LAYERS, is_operator

_EMBEDDING = torch.ops.aten.embedding.default


def float_operators(converted: fx.GraphModule) -> tuple[str, ...]:
    """Layers by their names, other operators by theirs with a number: `head (linear)`, `12 x softmax`."""
    layers, others = [], Counter[str]()
    for node in converted.graph.nodes:
        if node.op != "call_function" or is_operator(node, "") or not isinstance(node.meta.get("val"), Tensor):
            continue
        name = str(node.target)
        moves = is_free(name) or kind_of(name) == "data-movement"
        if moves or not node.meta["val"].is_floating_point() or _is_quantized(node):
            continue
        if node.target in LAYERS or node.target is _EMBEDDING:
            layers.append(f"{module_of(node)} ({short_name(name)})")
        else:
            others[short_name(name)] += 1
    return (*layers, *(f"{number} x {name}" for name, number in others.most_common()))


def describe_float_operators(operators: tuple[str, ...]) -> str:
    """A sentence for people."""
    return f"in floating point: {truncate_list(operators)}" if operators else "nothing stays in floating point"


def _is_quantized(node: fx.Node) -> bool:
    """Whether it reads 8-bit values, and what it computes is rounded to 8 bits, or clamped first."""
    sources = [source for source in node.all_input_nodes if _is_float(source) and source.op != "get_attr"]
    clamps = node.target in CLAMPS and all(not is_operator(source, "dequantize") for source in sources)
    whole = all(_is_quantized(source) if clamps else is_operator(source, "dequantize") for source in sources)
    return whole and _is_rounded(node)


def _is_rounded(node: fx.Node) -> bool:
    clamped = [user for user in node.users if user.target in CLAMPS]
    return bool(node.users) and all(
        is_operator(user, "quantize") or (user in clamped and _is_rounded(user)) for user in node.users
    )


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
