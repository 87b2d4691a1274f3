"""From a decoder with its cache to the bytes of a program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram

from edgetune.export import failures, operators
from edgetune.export.language.cached import Cached
from edgetune.export.language.shared import stored_once
from edgetune.export.lower import leftovers_of, placed_in, prepare
from edgetune.export.speed import fast_lowering
from edgetune.export.targets import Target
from edgetune.ledger import Leftover
from edgetune.profile.operators import Operator
from edgetune.quiet import quiet


@dataclass(frozen=True)
class LoweredLanguage:
    """The program and what is known of it without running it."""

    data: bytes
    shared_bytes: int
    plan_bytes: int
    delegates: int
    operators: tuple[Operator, ...]
    leftovers: tuple[Leftover, ...]


def lower(model: Cached, prefill_tokens: int, target: Target, facts: dict[str, Any]) -> LoweredLanguage:
    """Lower `model` for calls with 1 to `prefill_tokens` tokens.

    `facts` become methods that return them: what ExecuTorch's own language runner asks a program for.
    Raises `EdgetuneError` (exit code 5) with what cannot be captured or lowered.
    """
    with quiet(), torch.no_grad(), model.attending():
        program = _capture(model, prefill_tokens)
        prepare(program)
        return _compile(program, target, facts)


def _capture(model: Cached, prefill_tokens: int) -> ExportedProgram:
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  registers the cache's operators

    inputs = (torch.ones(1, prefill_tokens, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    count = torch.export.Dim("count", min=1, max=prefill_tokens)
    try:
        program = torch.export.export(model, inputs, dynamic_shapes=({1: count}, None), strict=False)
        found: ExportedProgram = program.run_decompositions({})
        return found
    except Exception as error:  # torch.export raises dozens of types, none of them documented as complete
        raise failures.not_captured(model, inputs, error) from error


def _compile(program: ExportedProgram, target: Target, facts: dict[str, Any]) -> LoweredLanguage:
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    try:
        with fast_lowering(), stored_once() as shared:
            edge = to_edge_transform_and_lower(
                program,
                partitioner=target.partitioners() or None,
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
                constant_methods=facts,
            )
            built = edge.to_executorch(ExecutorchBackendConfig(do_quant_fusion_and_const_prop=True))
            data = bytes(built.buffer)
    except Exception as error:  # executorch raises Exception, RuntimeError, ExportError and AssertionError alike
        raise failures.not_lowered(program, target.name, error) from error
    placed = placed_in(built.exported_program())
    plan = next(p for p in built.executorch_program.execution_plan if p.name == "forward")
    return LoweredLanguage(
        data=data,
        shared_bytes=shared.bytes,
        plan_bytes=sum(plan.non_const_buffer_sizes),
        delegates=placed.delegates,
        operators=operators.describe(program, placed),
        leftovers=leftovers_of(program, placed),
    )
