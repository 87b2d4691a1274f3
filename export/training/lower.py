"""Lower the graphs of a training program, with no trainable weight inside a delegate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from edgetune.capture import failures, operators
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.export import kernels
from edgetune.export.lower import Lowered, describe_method
from edgetune.export.pass_cache import fast_lowering
from edgetune.export.targets.target import Target
from edgetune.export.training import cuts
from edgetune.export.training.plan import is_delegate, training_planning_pass

TRAIN, FORWARD = "train", "forward"

# These pack their weights once, when the program is loaded: a delegate would never see an update.
PACKS_WEIGHTS = frozenset(
    {"ConvolutionConfig", "LinearConfig", "AddmmConfig", "MMConfig", "BatchNormConfig", "PreluConfig"}
)
_VIEWS = ("permute", "view", "squeeze", "expand", "alias", "clone", "transpose", "t_copy", "slice", "dim_order")


def compile_training(programs: dict[str, ExportedProgram], target: Target) -> tuple[dict[str, Lowered], int]:
    """Lower the methods into one program. Also returns the bytes of the state: trainable weights, and what the
    optimizer keeps.

    The methods share the state; it is not part of their arenas. Raises `EdgetuneError` (exit code 5) with the
    operators that cannot be lowered.
    """
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    for program in programs.values():
        operators.number(program)
    state = set(programs[TRAIN].graph_signature.buffers_to_mutate.values())
    try:
        with fast_lowering(), _separate_initial_values():
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
    lowered = {name: describe_method(built, name, program, data, sizes[name][1]) for name, program in programs.items()}
    return lowered, sum(sizes[TRAIN][2:])


def _config() -> Any:
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass

    return ExecutorchBackendConfig(
        memory_planning_pass=training_planning_pass(),
        emit_mutable_buffer_names=True,
        passes=[InitializedMutableBufferPass([""])],  # stores an initial value for every tensor of the state
    )


def _partitioners(target: Target, *, cut: bool) -> list[Any]:
    if target.name != "xnnpack":
        return target.partitioners()
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    configs = [refuse_state(config) for config in ALL_PARTITIONER_CONFIGS]
    return [cuts.cutting_partitioner(configs) if cut else XnnpackPartitioner(configs=configs)]


def refuse_state(config: type) -> type:
    """The partitioner configuration, without operators that would pack a tensor of the state."""
    if config.__name__ not in PACKS_WEIGHTS:
        return config

    class Refusing(config):  # type: ignore[valid-type, misc]
        def check_constraints(self, node: fx.Node, program: ExportedProgram) -> bool:
            return not is_fed_by(node, state_inputs(program)) and super().check_constraints(node, program)

    Refusing.__name__ = config.__name__
    return Refusing


def state_inputs(program: ExportedProgram) -> set[str]:
    """The placeholders of tensors that the program updates."""
    mutated = set(program.graph_signature.buffers_to_mutate.values())
    return {name for name, target in program.graph_signature.inputs_to_buffers.items() if target in mutated}


def is_fed_by(node: fx.Node, names: set[str]) -> bool:
    """Whether an operand of the node is one of the placeholders or a view of it."""
    for source in node.all_input_nodes:
        while source.op == "call_function" and any(word in str(source.target) for word in _VIEWS):
            source = source.all_input_nodes[0]
        if source.op == "placeholder" and source.name in names:
            return True
    return False


def check_delegates(program: ExportedProgram, state: set[str]) -> None:
    """Raise if a delegate of a lowered program contains a tensor of `state`: it would keep the old values."""
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
                f"a delegate contains the trainable {stale[0].removeprefix('model.')}: it would never see an update",
                got=str(node.args[0]),
                action="export for target='portable', and report the operator that reads it",
                exit_code=Exit.EXPORT,
            )


@contextmanager
def _separate_initial_values() -> Iterator[None]:
    """Inside, initial values of the state are kept apart from equal constants.

    executorch 1.4.1 looks up an initial value among the constants by its hash; if there is an equal one (a zero bias
    is enough), it stores the constant's index as that of the initial value, and the program starts with wrong values.
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
