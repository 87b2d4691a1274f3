"""A captured model becomes an ExecuTorch program. All calls into executorch's compiler are here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgetune.capture import failures, operators
from edgetune.capture.dynamic import Axis
from edgetune.capture.graph import capture, prepare
from edgetune.capture.operators import Placed
from edgetune.capture.reparameterize import Report, reparameterize
from edgetune.core.carriers import is_wrapped
from edgetune.core.errors import EdgetuneError, Exit, shortened
from edgetune.core.holders import refuse_sharded
from edgetune.core.ledger import UndelegatedOperator
from edgetune.core.quiet import quiet
from edgetune.export import apart, kernels, stored
from edgetune.export.planning import Planned, smallest
from edgetune.export.shared import stored_once
from edgetune.export.speed import fast_decompositions, fast_lowering
from edgetune.export.targets import Target
from edgetune.export.targets.target import Way
from edgetune.program import operator_kinds
from edgetune.program.executed import executed_operators
from edgetune.program.operators import Operator


@dataclass(frozen=True)
class Layout:
    """Where things of a program lie."""

    weights_apart: bool = False  # in a `.ptd` beside the `.pte`
    holds_io: bool = True  # inputs and outputs in the arena; else in memory of the caller's


PLAIN = Layout()


@dataclass(frozen=True)
class Lowered:
    """The program and what is known of it, or of one of its methods, without running it."""

    data: bytes
    plan_bytes: int
    delegates: int
    operators: tuple[Operator, ...]
    undelegated: tuple[UndelegatedOperator, ...]
    placed: Placed  # which operators a backend took
    folded: Report = field(default_factory=Report)  # what became part of another layer before
    plan: Planned | None = None
    weights: bytes = b""  # of the `.ptd`; empty: they are in `data`
    shared_bytes: int = 0  # stored once although two operators read them
    executed: tuple[Operator, ...] = ()  # as the runtime runs them, after the backend's compiler


def check_plain(model: nn.Module) -> None:
    """A weight that is computed in the forward pass is not seen as a constant and stays with slow kernels."""
    refuse_sharded(model)
    found = [name for name, layer in model.named_modules() if is_wrapped(layer)]
    if found:
        raise EdgetuneError(
            f"the model still has layers with adapters or slices: {shortened(found, 4)}",
            action="merge them first: model = et.finalize(model)",
            exit_code=Exit.EXPORT,
        )


def lower(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    target: Target,
    axes: Sequence[Axis] = (),
    layout: Layout = PLAIN,
) -> Lowered:
    """Lower `model`, in eval mode, for exactly the shapes of `inputs`, or for every size that `axes` may have.

    With `axes`, `inputs` have the greatest sizes: what is counted of the operators is counted at those.
    Raises `EdgetuneError` (exit code 5) with the operators that cannot be lowered and the modules they are in.
    """
    return lower_methods({"forward": (model, inputs, axes)}, target, layout)["forward"]


def lower_methods(
    methods: Mapping[str, tuple[nn.Module, tuple[Tensor, ...], Sequence[Axis]]], target: Target, layout: Layout = PLAIN
) -> dict[str, Lowered]:
    """Lower several models into one program, each as a method; `data` and `weights` are the same of all."""
    programs, folded = {}, {}
    with quiet(), torch.no_grad(), fast_decompositions():
        for name, (model, inputs, axes) in methods.items():
            stored.check(model, target)
            plain, folded[name] = reparameterize(model, inputs)
            try:
                programs[name] = capture(plain, inputs, target.name, axes)
                failures.check_drawn(programs[name])
            except EdgetuneError as error:
                raise error if len(methods) == 1 else error.within(f"method {name}") from error.__cause__
            prepare(programs[name])
        found = compile_programs(programs, target, layout)
    return {name: replace(lowered, folded=folded[name]) for name, lowered in found.items()}


def compile_program(
    program: ExportedProgram, target: Target, layout: Layout = PLAIN, facts: Mapping[str, Any] | None = None
) -> Lowered:
    """From ATen operators to the bytes of a `.pte`. `facts` become methods that return them."""
    return compile_programs({"forward": program}, target, layout, facts)["forward"]


def compile_programs(
    programs: Mapping[str, ExportedProgram],
    target: Target,
    layout: Layout = PLAIN,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Lowered]:
    """From the ATen operators of each method to one program. What is equal in two methods is stored once."""
    for program in programs.values():
        target.check(program)
    planning = smallest(holds_io=layout.holds_io)
    try:
        with fast_lowering(), stored_once() as shared:
            edge = _to_backend({name: target.way(program, target) for name, program in programs.items()}, facts)
            if layout.weights_apart:
                apart.move_out(edge)
            built = edge.to_executorch(_config(planning, layout))
            data = bytes(built.buffer)
            weights = apart.weights_of(built, target.name) if layout.weights_apart else b""
    except EdgetuneError:
        raise
    except Exception as error:  # executorch raises Exception, RuntimeError, ExportError and AssertionError alike
        raise _not_lowered(programs, target, error) from error
    kernels.check({name: built.exported_program(name) for name in programs}, programs, target)
    arenas = {plan.name: sum(plan.non_const_buffer_sizes) for plan in built.executorch_program.execution_plan}
    found = {}
    for (name, program), plan in zip(programs.items(), planning.plans, strict=True):
        placed = placed_in(built.exported_program(name))
        found[name] = Lowered(
            data=data,
            plan_bytes=arenas[name],
            delegates=placed.delegates,
            operators=operators.describe(program, placed),
            undelegated=undelegated_in(program, placed),
            placed=placed,
            plan=plan,
            weights=weights,
            shared_bytes=shared.bytes,
            executed=executed_operators(data, name, _modules(built.exported_program(name), operators.modules(program))),
        )
    return found


def _not_lowered(programs: Mapping[str, ExportedProgram], target: Target, error: Exception) -> EdgetuneError:
    """The error, told of the method that holds the operators which it names."""
    told = {name: failures.lowering_error(program, target.name, error) for name, program in programs.items()}
    name = max(told, key=lambda one: len(told[one].what))
    return told[name].within(f"method {name}") if len(told) > 1 else told[name]


def _config(planning: Any, layout: Layout) -> Any:
    from executorch.exir import ExecutorchBackendConfig

    return ExecutorchBackendConfig(
        do_quant_fusion_and_const_prop=True,
        memory_planning_pass=planning,
        external_constants=apart.tag if layout.weights_apart else False,
    )


def _to_backend(ways: Mapping[str, Way], facts: Mapping[str, Any] | None = None) -> Any:
    from executorch.backends.xnnpack._passes.remove_noop_expand_copy_pass import RemoveNoopExpandCopyPass
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    first = next(iter(ways.values()))
    passes: Any = first.passes  # a backend's own manager of passes serves every method
    if isinstance(passes, (tuple, list)):
        passes = {name: [RemoveNoopExpandCopyPass(), *way.passes] for name, way in ways.items()}
    with ExitStack() as around:
        for way in ways.values():
            around.enter_context(way.around)
        return to_edge_transform_and_lower(
            {name: way.program for name, way in ways.items()},
            partitioner={name: list(way.partitioners) for name, way in ways.items()},
            transform_passes=passes,
            compile_config=first.config or EdgeCompileConfig(_check_ir_validity=False),
            constant_methods=dict(facts or {}),
        )


class _Asked(Exception):
    """Carries the marked program out of executorch's lowering."""

    def __init__(self, marked: ExportedProgram) -> None:
        super().__init__()
        self.marked = marked


def marked(program: ExportedProgram, target: Target) -> ExportedProgram:
    """The program as the backend's partitioner sees it, its nodes marked by `delegation_tag`; nothing is compiled."""
    way = target.way(program, target)
    partitioner = way.partitioners[0]
    ask = partitioner.partition

    def answer(edge: ExportedProgram) -> None:
        raise _Asked(ask(edge).tagged_exported_program)

    partitioner.partition = answer
    try:
        with fast_lowering():
            _to_backend({"forward": way})
    except _Asked as found:
        return found.marked
    except Exception as error:  # as in a lowering
        raise failures.lowering_error(program, target.name, error) from error
    raise AssertionError("executorch no longer calls Partitioner.partition")


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
        elif isinstance(node.target, torch._ops.OpOverload) and not operator_kinds.is_free(name):
            portable.append((name, operators.number_of(node)))
    return Placed(delegated=frozenset(delegated), portable=tuple(portable), delegates=delegates)


def _modules(lowered: ExportedProgram, modules: Mapping[int, str]) -> list[str | dict[int, str]]:
    """For each call in the lowered graph the module it comes from; of a delegate a table by debug handle."""
    found: list[str | dict[int, str]] = []
    for node in lowered.graph.nodes:
        name = str(node.target)
        if node.op != "call_function":
            continue
        if "executorch_call_delegate" in name:
            inner = getattr(lowered.graph_module, node.args[0].target).original_module
            pairs = [(n.meta.get("debug_handle"), operators.number_of(n)) for n in inner.graph.nodes]
            found.append({h: modules.get(n, "") for h, n in pairs if isinstance(h, int) and n is not None})
        elif isinstance(node.target, torch._ops.OpOverload) and not operator_kinds.is_free(name):
            number = operators.number_of(node)
            found.append(modules.get(number, "") if number is not None else "")
    return found


def undelegated_in(program: ExportedProgram, placed: Placed) -> tuple[UndelegatedOperator, ...]:
    """The portable operators, each with the modules it comes from, most frequent first."""
    modules = operators.modules(program)
    counts = Counter((name, modules.get(number, "") if number is not None else "") for name, number in placed.portable)
    return tuple(
        UndelegatedOperator(operator=name, module=module, count=n) for (name, module), n in counts.most_common()
    )
