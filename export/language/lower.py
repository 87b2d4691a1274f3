"""From a decoder with its cache to the bytes of a program."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from edgetune.capture import operators
from edgetune.capture.dynamic import Axis
from edgetune.capture.graph import capture, prepare
from edgetune.core.quiet import silence_libraries
from edgetune.export import quantized_weights
from edgetune.export.language.cached import Cached
from edgetune.export.lower import Lowered, compile_program
from edgetune.export.targets.target import Target
from edgetune.program.executed import executed_operators
from edgetune.program.operators import Operator


def lower(model: Cached, prefill_tokens: int, target: Target, facts: dict[str, Any]) -> dict[str, Lowered]:
    """Lower `model` for calls with 1 to `prefill_tokens` tokens. What is known of a call with one, and with the most.

    `facts` become methods that return them: what ExecuTorch's own language runner asks a program for.
    Raises `EdgetuneError` (exit code 5) with what cannot be captured or lowered.
    """
    quantized_weights.check(model, target)
    inputs = (torch.ones(1, prefill_tokens, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    with silence_libraries(), torch.no_grad(), model.attending():
        import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  registers the cache's operators

        program = capture(model, inputs, target.name, [Axis("count", place=0, dim=1, low=1, high=prefill_tokens)])
        prepare(program)
        lowered = compile_program(program, target, facts=facts)
        with _of_one_token(program):
            single = operators.describe(program, lowered.placed)
    places = model.max_tokens
    one = executed_operators(lowered.data, instead={prefill_tokens: 1})
    after, some = prefill_tokens + 1, (prefill_tokens + 1) / 2  # places that a token attends to
    share, most = min(after, places) / places, prefill_tokens / places
    return {
        "token": replace(lowered, operators=_reading(single, after, share), executed=_reading(one, after, share)),
        "prompt": replace(
            lowered,
            operators=_reading(lowered.operators, some, most),
            executed=_reading(lowered.executed, some, most),
        ),
    }


@contextmanager
def _of_one_token(program: ExportedProgram) -> Iterator[None]:
    """While the body runs, the sizes that vary with the number of tokens are those of one."""
    kept = {node: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    try:
        for node, value in kept.items():
            node.meta["val"] = tree_map(_single, value)
        yield
    finally:
        for node, value in kept.items():
            node.meta["val"] = value


def _single(value: Any) -> Any:
    if not isinstance(value, Tensor) or all(isinstance(size, int) for size in value.shape):
        return value
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols  # imports sympy, half a second

    sizes = []
    for size in value.shape:
        if isinstance(size, int) or free_unbacked_symbols(size):
            sizes.append(size)
        else:
            expression = size.node.expr
            sizes.append(int(expression.subs(dict.fromkeys(expression.free_symbols, 1))))
    return torch.empty(sizes, dtype=value.dtype, device="meta") if all(isinstance(s, int) for s in sizes) else value


def _reading(listed: tuple[Operator, ...], places: float, share: float) -> tuple[Operator, ...]:
    """Attention as it runs: each token with so many `places` on average, over this share of the cache.

    The graph alone says neither: it hands the whole cache over. A cache is no weight, and writing to it moves only
    what is new.
    """
    found = []
    for operator in listed:
        if "custom_sdpa" in operator.operator:
            macs = round(2 * math.prod(operator.output_shape) * places)
            moved = operator.activation_bytes + round(operator.weight_bytes * share)
            operator = operator.model_copy(update={"macs": macs, "weight_bytes": 0, "activation_bytes": moved})
        elif "update_cache" in operator.operator:
            operator = operator.model_copy(update={"weight_bytes": 0})
        found.append(operator)
    return tuple(found)
