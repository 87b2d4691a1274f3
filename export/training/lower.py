"""From the graphs of a training program to its bytes, with no trainable weight inside a delegate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from edgetune.capture import failures, operators
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.export import kernels
from edgetune.export.lower import Lowered, placed_in, undelegated_in
from edgetune.export.speed import fast_lowering
from edgetune.export.targets import Target
from edgetune.export.training import cuts
from edgetune.export.training.plan import is_delegate, planning

TRAIN, FORWARD = "train", "forward"

# What these configurations take they pack once, when the program is loaded: an update would never be seen.
PACKS_WEIGHTS = frozenset(
    {"ConvolutionConfig", "LinearConfig", "AddmmConfig", "MMConfig", "BatchNormConfig", "PreluConfig"}
)
_SEEN_THROUGH = ("permute", "view", "squeeze", "expand", "alias", "clone", "transpose", "t_copy", "slice", "dim_order")


def compile_training(programs: dict[str, ExportedProgram], target: Target) -> tuple[dict[str, Lowered], int]:
    """Lower the methods into one program: each of them, and the bytes of what trains and its momentum.

    A method's arena is without that state, which they share. Raises `EdgetuneError` (exit code 5)
    with what does not lower.
    """
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    for program in programs.values():
        operators.number(program)
    state = set(programs[TRAIN].graph_signature.buffers_to_mutate.values())
    try:
        with fast_lowering(), _initial_values_by_themselves():
            edge = to_edge_transform_and_lower(
                programs,
                partitioner={name: _partitioners(target, cut=name == TRAIN) for name in programs},
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            built = edge.to_executorch(_config())
            for name in programs:
                check_delegates(built.exported_program(name), state)
            kernels.check({name: built.exported_program(name) for name in programs}, programs, target)
            data = bytes(built.buffer)
    except EdgetuneError:
        raise
    except Exception as error:  # executorch raises Exception, RuntimeError, ExportError and AssertionError alike
        raise failures.lowering_error(programs[TRAIN], target.name, error) from error
    sizes = {plan.name: list(plan.non_const_buffer_sizes) for plan in built.executorch_program.execution_plan}
    lowered = {}
    for name, program in programs.items():
        placed = placed_in(built.exported_program(name))
        lowered[name] = Lowered(
            data=data,
            plan_bytes=sizes[name][1],
            delegates=placed.delegates,
            operators=operators.describe(program, placed),
            undelegated=undelegated_in(program, placed),
            placed=placed,
        )
    return lowered, sum(sizes[TRAIN][2:])


def _config() -> Any:
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass

    return ExecutorchBackendConfig(
        memory_planning_pass=planning(),
        emit_mutable_buffer_names=True,
        passes=[InitializedMutableBufferPass([""])],  # every tensor of state begins with its value
    )


def _partitioners(target: Target, *, cut: bool) -> list[Any]:
    if target.name != "xnnpack":
        return target.partitioners()
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    configs = [refusing(config) for config in ALL_PARTITIONER_CONFIGS]
    return [cuts.partitioner(configs) if cut else XnnpackPartitioner(configs=configs)]


def refusing(config: type) -> type:
    """The partitioner configuration, refusing operators that would pack a tensor of state."""
    if config.__name__ not in PACKS_WEIGHTS:
        return config

    class Refusing(config):  # type: ignore[valid-type, misc]
        def check_constraints(self, node: fx.Node, program: ExportedProgram) -> bool:
            return not is_fed_by(node, state_inputs(program)) and super().check_constraints(node, program)

    Refusing.__name__ = config.__name__
    return Refusing


def state_inputs(program: ExportedProgram) -> set[str]:
    """Placeholders of what the program changes."""
    mutated = set(program.graph_signature.buffers_to_mutate.values())
    return {name for name, target in program.graph_signature.inputs_to_buffers.items() if target in mutated}


def is_fed_by(node: fx.Node, names: set[str]) -> bool:
    """Whether an operand of the node is one of the placeholders, as it is or through views."""
    for source in node.all_input_nodes:
        while source.op == "call_function" and any(word in str(source.target) for word in _SEEN_THROUGH):
            source = source.all_input_nodes[0]
        if source.op == "placeholder" and source.name in names:
            return True
    return False


def check_delegates(program: ExportedProgram, state: set[str]) -> None:
    """Raise where a delegate of a lowered program holds a tensor of `state`: it would go on with the old values."""
    for node in program.graph.nodes:
        if not is_delegate(node):
            continue
        inner = getattr(program.graph_module, str(node.args[0].target)).original_module  # type: ignore[union-attr]
        signature = inner.graph_signature
        held = {
            *signature.inputs_to_parameters.values(),
            *signature.inputs_to_buffers.values(),
            *signature.inputs_to_lifted_tensor_constants.values(),
        }
        stale = sorted(held & state)
        if stale:
            raise EdgetuneError(
                f"a delegate holds {stale[0].removeprefix('model.')}, which trains: it would never see an update",
                got=str(node.args[0]),
                action="export for the target portable, and report the operator that reads it",
                exit_code=Exit.EXPORT,
            )


@contextmanager
def _initial_values_by_themselves() -> Iterator[None]:
    """Keep the initial values of state apart from constants while a program is written.

    executorch 1.4.1 looks a named initial value up among the constants by its hash, and where it finds one (a zero
    bias is enough) writes the constant's place into the table of initial values: the program then starts with others.
    """
    from executorch.exir.emit import _emitter

    stock = _emitter._Emitter._tensor_spec_to_evalue

    def emit(self: Any, spec: Any, constant_tag: str | None = None) -> Any:
        if not (spec.const and spec.mem_id is not None and spec.mem_offset is not None):
            return stock(self, spec, constant_tag)
        state = self.program_state
        constants, state.cached_spec_hash_values = state.cached_spec_hash_values, state.cached_spec_mutable_hash_values
        try:
            return stock(self, spec, constant_tag)
        finally:
            state.cached_spec_hash_values = constants

    _emitter._Emitter._tensor_spec_to_evalue = emit
    try:
        yield
    finally:
        _emitter._Emitter._tensor_spec_to_evalue = stock
