"""Capture a model as a graph of ATen operators, with the repairs for its target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from edgetune.capture import dynamic, failures, operators, repairs
from edgetune.capture.dynamic import Axis
from edgetune.capture.fast_path import slow_path
from edgetune.capture.repairs.experts import static_experts
from edgetune.core.errors import EdgetuneError, Exit


def capture(
    model: nn.Module, inputs: tuple[Tensor, ...], target: str | None = None, axes: Sequence[Axis] = ()
) -> ExportedProgram:
    """Capture the model as a functional graph of ATen operators, with the repairs for this target."""
    try:
        with static_experts(model), slow_path(model), failures.no_partial_graph():
            shapes = dynamic.shapes_for(model, axes, len(inputs))
            program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
        repairs.before(program)
        decomposed: ExportedProgram = program.run_decompositions(repairs.decompositions(target))
        _check_inputs_unwritten(decomposed)
        repairs.repair_graph(decomposed, target)
        if axes:
            dynamic.infer_views(decomposed)
        return decomposed
    except EdgetuneError:
        raise
    except Exception as error:  # torch.export raises dozens of types, none of them documented as complete
        bounded = dynamic.bounds_error(axes, error) if axes else None
        raise bounded or failures.capture_error(model, inputs, error) from error


def _check_inputs_unwritten(program: ExportedProgram) -> None:
    """Raise for a model that changes its inputs in place: a program would return them before its outputs."""
    written = program.graph_signature.user_inputs_to_mutate
    if written:
        places = [program.graph_signature.user_inputs.index(name) for name in written.values()]
        raise EdgetuneError(
            "the model writes into its inputs, but a program only returns the outputs of the model",
            got=[f"input {place}" for place in places],
            action="write into a copy, x = x.clone(), and return the result",
            exit_code=Exit.EXPORT,
        )


def prepare(program: ExportedProgram) -> None:
    """Remove duplicate computations (every layer converts the same mask), and number the operators."""
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

    Quantization stays: XNNPACK takes a dynamically quantized linear only with its own quantizer.
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
