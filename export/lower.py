"""A model becomes an ExecuTorch program: capture, prepare, lower. All calls into executorch's compiler are here."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from edgetune.export import failures, operators
from edgetune.export.operators import Placed
from edgetune.export.speed import fast_lowering
from edgetune.export.targets import Target
from edgetune.ledger import Leftover
from edgetune.profile.operators import Operator
from edgetune.quiet import quiet
from edgetune.technique import Inputs, call, logits_of


@dataclass(frozen=True)
class Lowered:
    """The program and what is known of it without running it."""

    data: bytes
    plan_bytes: int
    delegates: int
    operators: tuple[Operator, ...]
    leftovers: tuple[Leftover, ...]


class Positional(nn.Module):
    """The model as a program sees it: positional tensors in, logits out.

    The child has a name because XNNPACK's batch-norm fusion fails on parameters whose names begin with a digit.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(inputs) if isinstance(inputs, dict) else ()

    def forward(self, *tensors: Tensor) -> Tensor:
        """The logits for one tensor per input."""
        return logits_of(call(self.model, dict(zip(self.names, tensors)) if self.names else tensors))  # noqa: B905


def lower(model: Positional, inputs: tuple[Tensor, ...], target: Target) -> Lowered:
    """Lower `model`, in eval mode, for exactly the shapes of `inputs`.

    Raises `EdgetuneError` (exit code 5) with the operators that cannot be lowered and the modules they are in.
    """
    with quiet(), torch.no_grad():
        program = capture(model, inputs)
        prepare(program)
        return compile_program(program, target)


def capture(model: Positional, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """The model as a graph of ATen operators, functional, attention written out."""
    try:
        program = torch.export.export(model, inputs, strict=False)
        found: ExportedProgram = program.run_decompositions(
            {torch.ops.aten.scaled_dot_product_attention.default: attention}
        )
        return found
    except Exception as error:  # torch.export raises dozens of types, none of them documented as complete
        raise failures.not_captured(model, inputs, error) from error


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention `(..., length, head)` in operators that XNNPACK takes.

    The stock decomposition tests every row for being masked as a whole, which splits each attention into two
    delegates with five portable operators between them. Here a masked place gets the half of the lowest finite
    number instead of -inf. The outcome differs only in a row that may look at nothing: the mean of the values,
    where the stock one gives zeros.
    """
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    if enable_gqa:
        groups = query.size(-3) // key.size(-3)
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    lowest = torch.finfo(query.dtype).min / 2
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
        scores = scores + torch.where(hidden, lowest, 0.0).to(query.dtype)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores + torch.where(attn_mask, 0.0, lowest).to(query.dtype)
    elif attn_mask is not None:
        scores = scores + attn_mask.clamp(min=lowest)
    return torch.matmul(torch.softmax(scores, -1), value)


def prepare(program: ExportedProgram) -> None:
    """Compute what is computed twice once (every layer converts the same mask), and number the operators."""
    graph = program.graph
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        key = key_of(node)
        if key is None:
            continue
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node
    program.graph_module.recompile()
    operators.number(program)


def key_of(node: fx.Node) -> Any:
    """Equal for nodes that compute the same; `None` for one that must stay.

    Quantization is left alone: XNNPACK takes a dynamically quantized linear only with a quantizer of its own.
    """
    if node.op != "call_function" or not str(node.target).startswith("aten."):
        return None
    if torch.Tag.nondeterministic_seeded in node.target.tags or any(user.op == "output" for user in node.users):  # type: ignore[union-attr]
        return None
    key = (node.target, _hashable(node.args), _hashable(node.kwargs))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _hashable(item)) for name, item in sorted(value.items()))
    return value if isinstance(value, fx.Node) else (type(value), value)


def compile_program(program: ExportedProgram, target: Target) -> Lowered:
    """From ATen operators to the bytes of a `.pte`."""
    from executorch.backends.xnnpack._passes.remove_noop_expand_copy_pass import RemoveNoopExpandCopyPass
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    partitioners = target.partitioners()
    config = ExecutorchBackendConfig(do_quant_fusion_and_const_prop=True)
    try:
        with fast_lowering():
            edge = to_edge_transform_and_lower(
                program,
                partitioner=partitioners or None,
                transform_passes=[RemoveNoopExpandCopyPass()],
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            built = edge.to_executorch(config)
            data = bytes(built.buffer)
    except Exception as error:  # executorch raises Exception, RuntimeError, ExportError and AssertionError alike
        raise failures.not_lowered(program, target.name, error) from error
    placed = placed_in(built.exported_program())
    return Lowered(
        data=data,
        plan_bytes=sum(built.executorch_program.execution_plan[0].non_const_buffer_sizes),
        delegates=placed.delegates,
        operators=operators.describe(program, placed),
        leftovers=leftovers_of(program, placed),
    )


def placed_in(lowered: ExportedProgram) -> Placed:
    """Which numbered operators ended in a delegate and which as a portable kernel."""
    delegated: set[int] = set()
    portable: list[tuple[str, int | None]] = []
    delegates = 0
    for node in lowered.graph.nodes:
        if node.op != "call_function":
            continue
        name = str(node.target)
        if "executorch_call_delegate" in name:
            delegates += 1
            inner = getattr(lowered.graph_module, node.args[0].target).original_module
            delegated |= {n for n in map(operators.number_of, inner.graph.nodes) if n is not None}
        elif isinstance(node.target, torch._ops.OpOverload) and not operators.is_free(name):
            portable.append((name, operators.number_of(node)))
    return Placed(delegated=frozenset(delegated), portable=tuple(portable), delegates=delegates)


def leftovers_of(program: ExportedProgram, placed: Placed) -> tuple[Leftover, ...]:
    """The portable operators, each with the modules it comes from, most frequent first."""
    modules = operators.modules(program)
    counts = Counter((name, modules.get(number, "") if number is not None else "") for name, number in placed.portable)
    return tuple(Leftover(operator=name, module=module, count=n) for (name, module), n in counts.most_common())
