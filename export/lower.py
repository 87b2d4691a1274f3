"""Lower a captured model to an ExecuTorch program. All calls into executorch's compiler are in this file."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from edgetune.capture import failures, operators
from edgetune.capture.dynamic import Axis
from edgetune.capture.graph import capture, prepare
from edgetune.capture.narrow import narrow
from edgetune.capture.operators import Placed
from edgetune.capture.reparameterize import Report, reparameterize
from edgetune.core.carriers import is_wrapped
from edgetune.core.errors import EdgetuneError, Exit, truncate_list
from edgetune.core.holders import refuse_sharded
from edgetune.core.ledger import UndelegatedOperator
from edgetune.core.quiet import silence_libraries
from edgetune.export import external_weights, kernels, quantized_weights
from edgetune.export.arena import ArenaPlan, plan_smallest_arena
from edgetune.export.dedupe_constants import dedupe_constants
from edgetune.export.fp16_weights import fp16_weights
from edgetune.export.pass_cache import fast_decompositions, fast_lowering
from edgetune.export.targets.target import LoweringPlan, Target
from edgetune.program import operator_kinds
from edgetune.program.executed import Execution, execution_of
from edgetune.program.operators import Operator
from edgetune.quant.palettize import palettized_layers


@dataclass(frozen=True)
class Layout:
    """Where the weights, the inputs and the outputs of a program are stored."""

    external_data: bool = False  # weights in a `.ptd` next to the `.pte`
    io_in_plan: bool = True  # inputs and outputs in the arena; else in the caller's memory


DEFAULT_LAYOUT = Layout()


@dataclass(frozen=True)
class Lowered:
    """A lowered program, or one of its methods, with its static figures."""

    data: bytes
    plan_bytes: int
    delegates: int
    operators: tuple[Operator, ...]
    undelegated: tuple[UndelegatedOperator, ...]
    placed: Placed  # which operators the backend took
    folded: Report = field(default_factory=Report)  # layers that were folded into others beforehand
    plan: ArenaPlan | None = None
    weights: bytes = b""  # the bytes of the `.ptd`; empty if the weights are in `data`
    shared_bytes: int = 0  # constants that two operators read and that are stored once
    execution: Execution = field(default_factory=Execution)

    @property
    def executed(self) -> tuple[Operator, ...]:
        """The operators as the runtime executes them, after the backend's compiler."""
        return self.execution.operators


def check_finalized(model: nn.Module) -> None:
    """Raise if layers still carry adapters or slices: their computed weights would run on slow kernels."""
    refuse_sharded(model)
    layers = [name for name, layer in model.named_modules() if is_wrapped(layer)]
    if layers:
        raise EdgetuneError(
            f"the model still has layers with adapters or slices: {truncate_list(layers, 4)}",
            action="merge them first: model = et.finalize(model)",
            exit_code=Exit.EXPORT,
        )


def lower(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    target: Target,
    axes: Sequence[Axis] = (),
    layout: Layout = DEFAULT_LAYOUT,
    dtype: torch.dtype = torch.float32,
) -> Lowered:
    """Lower `model`, in eval mode, for exactly the shapes of `inputs`, or for every size that `axes` allow.

    With `axes`, `inputs` have the largest sizes, and operators are counted at those sizes. `dtype` is the type that the
    program computes in; it takes and returns the types of `model`.
    Raises `EdgetuneError` (exit code 5) with the operators that cannot be lowered and their modules.
    """
    return lower_methods({"forward": (model, inputs, axes)}, target, layout, dtype)["forward"]


def lower_methods(
    methods: Mapping[str, tuple[nn.Module, tuple[Tensor, ...], Sequence[Axis]]],
    target: Target,
    layout: Layout = DEFAULT_LAYOUT,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Lowered]:
    """Lower several models into one program, each as a method; all methods share `data` and `weights`."""
    programs, folded = {}, {}
    for model, *_ in methods.values():
        _warn_of_palettes(model, target)
    with silence_libraries(), torch.no_grad(), fast_decompositions():
        for name, (model, inputs, axes) in methods.items():
            quantized_weights.check(model, target)
            plain, folded[name] = reparameterize(model, inputs)
            plain = plain if dtype == torch.float32 else narrow(plain, dtype)
            try:
                programs[name] = capture(plain, inputs, target.name, axes)
                failures.check_drawn(programs[name])
            except EdgetuneError as error:
                raise error if len(methods) == 1 else error.within(f"method {name}") from error.__cause__
            prepare(programs[name])
        lowered = compile_programs(programs, target, layout)
    return {name: replace(method, folded=folded[name]) for name, method in lowered.items()}


def _warn_of_palettes(model: nn.Module, target: Target) -> None:
    names = [] if target.name == "coreml" else list(map(operators.shorten, palettized_layers(model)))
    if names:
        warnings.warn(
            f"target {target.name} stores the weights of few values in full, as {truncate_list(names)}: only coreml "
            "stores them as codes",
            stacklevel=2,
        )


def compile_program(
    program: ExportedProgram, target: Target, layout: Layout = DEFAULT_LAYOUT, facts: Mapping[str, Any] | None = None
) -> Lowered:
    """Compile ATen operators to the bytes of a `.pte`. `facts` become methods that return constants."""
    return compile_programs({"forward": program}, target, layout, facts)["forward"]


def compile_programs(
    programs: Mapping[str, ExportedProgram],
    target: Target,
    layout: Layout = DEFAULT_LAYOUT,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Lowered]:
    """Compile the ATen operators of each method to one program. Equal weights of two methods are stored once."""
    for program in programs.values():
        target.check(program)
    planning = plan_smallest_arena(io_in_plan=layout.io_in_plan)
    try:
        with fast_lowering(), fp16_weights(), dedupe_constants() as savings:
            edge = _lower_to_backend({name: target.plan(program, target) for name, program in programs.items()}, facts)
            if layout.external_data:
                external_weights.externalize_weights(edge)
            built = edge.to_executorch(_config(planning, layout))
            data = bytes(built.buffer)
            weights = external_weights.read_weights(built, target.name) if layout.external_data else b""
    except EdgetuneError:
        raise
    except Exception as error:  # executorch raises Exception, RuntimeError, ExportError and AssertionError alike
        raise _lowering_error(programs, target, error) from error
    kernels.check({name: built.exported_program(name) for name in programs}, programs, target)
    arenas = {plan.name: sum(plan.non_const_buffer_sizes) for plan in built.executorch_program.execution_plan}
    methods = {}
    for (name, program), plan in zip(programs.items(), planning.plans, strict=True):
        modules = _modules_by_call(built.exported_program(name), operators.modules(program))
        methods[name] = replace(
            describe_method(built, name, program, data, arenas[name]),
            plan=plan,
            weights=weights,
            shared_bytes=savings.bytes,
            execution=execution_of(data, name, modules),
        )
    return methods


def describe_method(built: Any, name: str, program: ExportedProgram, data: bytes, plan_bytes: int) -> Lowered:
    """One method of a compiled program, without its arena plan and its executed operators."""
    placed = placement_of(built.exported_program(name))
    return Lowered(
        data=data,
        plan_bytes=plan_bytes,
        delegates=placed.delegates,
        operators=operators.describe(program, placed),
        undelegated=undelegated_operators(program, placed),
        placed=placed,
    )


def _lowering_error(programs: Mapping[str, ExportedProgram], target: Target, error: Exception) -> EdgetuneError:
    """The error for the method that contains the operators which executorch names."""
    errors = {name: failures.lowering_error(program, target.name, error) for name, program in programs.items()}
    name = max(errors, key=lambda method: len(errors[method].what))
    return errors[name].within(f"method {name}") if len(errors) > 1 else errors[name]


def _config(planning: Any, layout: Layout) -> Any:
    from executorch.exir import ExecutorchBackendConfig

    return ExecutorchBackendConfig(
        do_quant_fusion_and_const_prop=True,
        memory_planning_pass=planning,
        external_constants=external_weights.tag_external if layout.external_data else False,
    )


def _lower_to_backend(plans: Mapping[str, LoweringPlan], facts: Mapping[str, Any] | None = None) -> Any:
    from executorch.backends.xnnpack._passes.remove_noop_expand_copy_pass import RemoveNoopExpandCopyPass
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    first = next(iter(plans.values()))
    passes: Any = first.passes  # if a backend brings its own pass manager, it serves every method
    if isinstance(passes, (tuple, list)):
        passes = {name: [RemoveNoopExpandCopyPass(), *plan.passes] for name, plan in plans.items()}
    with ExitStack() as stack:
        for plan in plans.values():
            stack.enter_context(plan.context)
        return to_edge_transform_and_lower(
            {name: plan.program for name, plan in plans.items()},
            partitioner={name: list(plan.partitioners) for name, plan in plans.items()},
            transform_passes=passes,
            compile_config=first.config or EdgeCompileConfig(_check_ir_validity=False),
            constant_methods=dict(facts or {}),
        )


class StopAfterPartitioning(Exception):
    """Carries the tagged program out of executorch's lowering."""

    def __init__(self, tagged: ExportedProgram) -> None:
        super().__init__()
        self.tagged = tagged


def tag_delegated(program: ExportedProgram, target: Target) -> ExportedProgram:
    """The program with `delegation_tag` set by the backend's partitioner on what it takes; compiles nothing."""
    plan = target.plan(program, target)
    partitioner = plan.partitioners[0]
    partition = partitioner.partition

    def stop(edge: ExportedProgram) -> None:
        raise StopAfterPartitioning(partition(edge).tagged_exported_program)

    partitioner.partition = stop
    try:
        with fast_lowering():
            _lower_to_backend({"forward": plan})
    except StopAfterPartitioning as stopped:
        return stopped.tagged
    except Exception as error:  # as in a lowering
        raise failures.lowering_error(program, target.name, error) from error
    raise AssertionError("executorch no longer calls Partitioner.partition")


def _calls(lowered: ExportedProgram) -> Iterator[tuple[fx.Node, fx.Graph | None]]:
    """Each call of the lowered graph that runs: a kernel, or a delegate with its graph."""
    for node in lowered.graph.nodes:
        if node.op != "call_function":
            continue
        name = str(node.target)
        if "executorch_call_delegate" in name:
            yield node, getattr(lowered.graph_module, node.args[0].target).original_module.graph
        elif isinstance(node.target, torch._ops.OpOverload) and not operator_kinds.is_free(name):
            yield node, None


def placement_of(lowered: ExportedProgram) -> Placed:
    """Which numbered operators run in a delegate and which on a portable kernel."""
    delegated: set[int] = set()
    portable: list[tuple[str, int | None]] = []
    delegates = 0
    for node, inner in _calls(lowered):
        if inner is None:
            portable.append((str(node.target), operators.number_of(node)))
        else:
            delegates += 1
            delegated |= {n for n in map(operators.number_of, inner.nodes) if n is not None}
    return Placed(delegated=frozenset(delegated), portable=tuple(portable), delegates=delegates)


def _modules_by_call(lowered: ExportedProgram, modules: Mapping[int, str]) -> list[str | dict[int, str]]:
    """The module of each call in the lowered graph; for a delegate, a table by debug handle."""
    by_call: list[str | dict[int, str]] = []
    for node, inner in _calls(lowered):
        if inner is None:
            number = operators.number_of(node)
            by_call.append("" if number is None else modules.get(number, ""))
        else:
            pairs = [(n.meta.get("debug_handle"), operators.number_of(n)) for n in inner.nodes]
            by_call.append({h: modules.get(n, "") for h, n in pairs if isinstance(h, int) and n is not None})
    return by_call


def undelegated_operators(program: ExportedProgram, placed: Placed) -> tuple[UndelegatedOperator, ...]:
    """The operators that run on portable kernels, by module, the most frequent first."""
    modules = operators.modules(program)
    counts = Counter((name, modules.get(number, "") if number is not None else "") for name, number in placed.portable)
    return tuple(
        UndelegatedOperator(operator=name, module=module, count=n) for (name, module), n in counts.most_common()
    )
