"""Lower a decoder with its cache to a program."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from edgetune.capture import operators
from edgetune.capture.dynamic import Axis
from edgetune.capture.graph import capture, prepare
from edgetune.core.quiet import silence_libraries
from edgetune.export import quantized_weights
from edgetune.export.language.cached import CachedDecoder
from edgetune.export.lower import DEFAULT_LAYOUT, Layout, Lowered, compile_programs
from edgetune.export.pass_cache import fast_decompositions
from edgetune.export.targets.target import Target
from edgetune.program.executed import execution_of
from edgetune.program.operators import Operator

_ROW_BYTES = {"fp32": 8, "bf16": 4, "fp16": 4, "int8": 5}  # of a query's value and an output's, which is never int8


def lower(
    model: CachedDecoder,
    prefill_tokens: int,
    target: Target,
    facts: dict[str, Any],
    given: tuple[Tensor, ...] = (),
    layout: Layout = DEFAULT_LAYOUT,
    others: Mapping[str, tuple[nn.Module, tuple[Tensor, ...]]] | None = None,
) -> dict[str, Lowered]:
    """Lower `model` for calls with 1 to `prefill_tokens` tokens; returns the call with one, and with all of them.

    `facts` become methods that return constants, for ExecuTorch's language runner. `given` are inputs after tokens and
    position. `others` become further methods, each a module for inputs of these shapes, returned by their names.
    Raises `EdgetuneError` (exit code 5) with what cannot be captured or lowered.
    """
    quantized_weights.check(model, target)
    inputs = (torch.ones(1, prefill_tokens, dtype=torch.long), torch.zeros(1, dtype=torch.long), *given)
    with silence_libraries(), torch.no_grad():
        import executorch.extension.llm.custom_ops.custom_ops  # registers the cache's operators
        import executorch.kernels.quantized  # noqa: F401  and the kernels that quantize an int8 cache
        from torch.ao.quantization.fx import _decomposed  # noqa: F401  and those that quantize an int8 cache

        with fast_decompositions():
            axis = Axis("count", place=0, dim=1, low=1, high=prefill_tokens)
            with model.attending():
                program = capture(model, inputs, target.name, [axis])
            programs = {name: capture(module, row, target.name) for name, (module, row) in (others or {}).items()}
            programs = {"forward": program, **programs}
            for each in programs.values():
                prepare(each)
        methods = compile_programs(programs, target, layout, facts)
        lowered = methods.pop("forward")
        with _assume_one_token(program):
            single = operators.describe(program, lowered.placed)
    positions = model.max_tokens
    whole, part = lowered.execution, execution_of(lowered.data, dynamic=(prefill_tokens, 1))
    one = tuple(
        operator.model_copy(update={"module": named.module})
        for operator, named in zip(part.operators, whole.operators, strict=True)
    )
    after, mean = prefill_tokens + 1, (prefill_tokens + 1) / 2  # positions that a token attends to
    share, most = min(after, positions) / positions, prefill_tokens / positions
    return {
        **methods,
        "token": replace(
            lowered,
            operators=_count_attention(single, after, share),
            execution=replace(part, operators=_count_attention(one, after, share)),
        ),
        "prompt": replace(
            lowered,
            operators=_count_attention(lowered.operators, mean, most),
            execution=replace(whole, operators=_count_attention(whole.operators, mean, most)),
        ),
    }


@contextmanager
def _assume_one_token(program: ExportedProgram) -> Iterator[None]:
    """Inside, sizes that depend on the number of tokens are those for one token."""
    values = {node: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    try:
        for node, value in values.items():
            node.meta["val"] = tree_map(_resolve_size, value)
        yield
    finally:
        for node, value in values.items():
            node.meta["val"] = value


def _resolve_size(value: Any) -> Any:
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


def _count_attention(operators_lowered: tuple[Operator, ...], positions: float, share: float) -> tuple[Operator, ...]:
    """Count attention as it runs: each token attends to `positions` on average, over this share of the cache.

    In the graph it reads the whole cache, as weights or, after an update, as activations.
    """
    operators_counted = []
    for operator in operators_lowered:
        if "sdpa" in operator.operator:
            values = math.prod(operator.output_shape)
            rows_bytes = values * _ROW_BYTES[operator.dtype]
            cache_bytes = operator.activation_bytes + operator.weight_bytes - rows_bytes
            moved = {"weight_bytes": 0, "activation_bytes": rows_bytes + round(cache_bytes * share)}
            operator = operator.model_copy(update={"macs": round(2 * values * positions), **moved})
        operators_counted.append(operator)
    return tuple(operators_counted)
