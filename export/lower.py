"""A model becomes an ExecuTorch program: capture, prepare, lower. All calls into executorch's compiler are here."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from edgetune.export import failures, operators, repairs
from edgetune.export.operators import Placed
from edgetune.export.repairs.experts import static_experts
from edgetune.export.reparameterize import Report, reparameterize
from edgetune.export.speed import fast_lowering
from edgetune.export.targets import Target
from edgetune.export.targets.target import Way
from edgetune.ledger import Leftover
from edgetune.modes import undisturbed
from edgetune.profile.operators import Operator
from edgetune.quiet import quiet
from edgetune.technique import EdgetuneError, Exit, Inputs, call, device_of, logits_of, shortened
from edgetune.wrapped import is_wrapped


@dataclass(frozen=True)
class Lowered:
    """The program and what is known of it without running it."""

    data: bytes
    plan_bytes: int
    delegates: int
    operators: tuple[Operator, ...]
    leftovers: tuple[Leftover, ...]
    folded: Report = field(default_factory=Report)  # what became part of another layer before


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


@contextmanager
def as_program(model: nn.Module, inputs: Inputs) -> Iterator[Positional]:
    """The model in eval mode, on the CPU and without a key-value cache; put back as it was afterwards."""
    config = getattr(model, "config", None)
    caches = getattr(config, "use_cache", None)
    with undisturbed(model):
        try:
            if caches:
                config.use_cache = False  # type: ignore[union-attr]
            here = model if device_of(model).type == "cpu" else copy.deepcopy(model).cpu()
            yield Positional(here, inputs).eval()
        finally:
            if caches:
                config.use_cache = caches  # type: ignore[union-attr]


def check_plain(model: nn.Module) -> None:
    """A weight that is computed in the forward pass is not seen as a constant and stays with slow kernels."""
    found = [name for name, layer in model.named_modules() if is_wrapped(layer)]
    if found:
        raise EdgetuneError(
            f"the model still has layers that carry something extra: {shortened(found, 4)}",
            action="fold them first: model = et.finalize(model)",
            exit_code=Exit.EXPORT,
        )


def lower(model: nn.Module, inputs: tuple[Tensor, ...], target: Target) -> Lowered:
    """Lower `model`, in eval mode, for exactly the shapes of `inputs`.

    Raises `EdgetuneError` (exit code 5) with the operators that cannot be lowered and the modules they are in.
    """
    with quiet(), torch.no_grad():
        plain, folded = reparameterize(model, inputs)
        program = capture(plain, inputs, target.name)
        prepare(program)
        return replace(compile_program(program, target), folded=folded)


def capture(model: nn.Module, inputs: tuple[Tensor, ...], target: str | None = None) -> ExportedProgram:
    """The model as a graph of ATen operators, functional, with the repairs that this target wants."""
    try:
        with static_experts(model):
            program = torch.export.export(model, inputs, strict=False)
        repairs.before(program)
        found: ExportedProgram = program.run_decompositions(repairs.decompositions(target))
        repairs.repair_graph(found, target)
        return found
    except Exception as error:  # torch.export raises dozens of types, none of them documented as complete
        raise failures.not_captured(model, inputs, error) from error


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
    from executorch.exir import ExecutorchBackendConfig

    target.check(program)
    config = ExecutorchBackendConfig(do_quant_fusion_and_const_prop=True)
    try:
        with fast_lowering():
            built = _to_backend(target.way(program, target)).to_executorch(config)
            data = bytes(built.buffer)
    except EdgetuneError:
        raise
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


def _to_backend(way: Way) -> Any:
    from executorch.backends.xnnpack._passes.remove_noop_expand_copy_pass import RemoveNoopExpandCopyPass
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    passes: Any = way.passes
    if isinstance(passes, (tuple, list)):
        passes = [RemoveNoopExpandCopyPass(), *passes]
    with way.around:
        return to_edge_transform_and_lower(
            way.program,
            partitioner=list(way.partitioners) or None,
            transform_passes=passes,
            compile_config=way.config or EdgeCompileConfig(_check_ir_validity=False),
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
            _to_backend(way)
    except _Asked as found:
        return found.marked
    except Exception as error:  # as in a lowering
        raise failures.not_lowered(program, target.name, error) from error
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
        elif isinstance(node.target, torch._ops.OpOverload) and not operators.is_free(name):
            portable.append((name, operators.number_of(node)))
    return Placed(delegated=frozenset(delegated), portable=tuple(portable), delegates=delegates)


def leftovers_of(program: ExportedProgram, placed: Placed) -> tuple[Leftover, ...]:
    """The portable operators, each with the modules it comes from, most frequent first."""
    modules = operators.modules(program)
    counts = Counter((name, modules.get(number, "") if number is not None else "") for name, number in placed.portable)
    return tuple(Leftover(operator=name, module=module, count=n) for (name, module), n in counts.most_common())
