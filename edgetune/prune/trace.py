"""Trace a model's layers into torch-pruning's dependency graph."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs, call, tensors_in
from edgetune.core.layers import is_transposed
from edgetune.core.registry import require
from edgetune.prune.layers import width_of


@dataclass(frozen=True)
class Dependent:
    """A module or another node of the graph that must follow a cut, and which positions follow which outputs."""

    module: Any
    name: str  # for messages
    writes: bool  # the units are its outputs
    reads: bool  # they are its inputs
    ends: bool  # nothing comes after it
    pairs: tuple[tuple[int, int | None], ...]  # a position, and the output of the root that it follows


_VISITS = 500  # of one node; and so many outputs for each position: the library's rules can go round in a circle
_ROOTS = 32


@dataclass(frozen=True)
class Traced:
    """The library's graph, every parameter that the output depends on, and the modules that were called."""

    graph: Any
    reached: frozenset[Tensor]
    called: frozenset[nn.Module]

    def dependents(self, layer: nn.Module) -> list[Dependent]:
        """Everything that must follow when all outputs of `layer` are cut, the layer itself first.

        Raises `LookupError` or another plain error where the library's rules lead nowhere. Not by its own
        `get_pruning_group`, which does not end where slices shift an index in a circle.
        """
        graph = self.graph
        root = graph.module2node[layer]
        start = graph.get_pruner_of_module(layer).prune_out_channels
        first = [_index(position, position) for position in range(width_of(layer, "out"))]
        widest = max(max(parameter.shape, default=0) for parameter in graph.model.parameters())
        pairs: dict[tuple[Any, Any], dict[Any, None]] = {(root, start): dict.fromkeys(first)}
        visits: dict[Any, int] = {}
        waiting = [(root, start, first)]
        while waiting:
            node, handler, positions = waiting.pop()
            visits[node] = visits.get(node, 0) + 1
            if visits[node] > _VISITS:
                raise LookupError("positions that shift without end")
            for dependency in node.dependencies:
                if not dependency.is_triggered_by(handler):
                    continue
                mapped = positions
                for mapping in dependency.index_mapping:
                    mapped = mapping(mapped) if mapping is not None else mapped
                key = (dependency.target, dependency.handler)
                before = pairs.setdefault(key, {})
                new = [index for index in dict.fromkeys(mapped) if index not in before]
                before.update(dict.fromkeys(new))
                if len(before) > _ROOTS * widest or any(index.idx >= widest for index in new):
                    raise LookupError("positions beyond every layer's width")
                if new:
                    waiting.append((*key, new))
        return [
            Dependent(
                module=node.module,
                name=str(graph._param_to_name.get(node.module, node.name))
                if isinstance(node.module, nn.Parameter)
                else str(node.name),
                writes=graph.is_out_channel_pruning_fn(handler),
                reads=graph.is_in_channel_pruning_fn(handler),
                ends=not node.outputs,
                pairs=tuple(sorted(((i.idx, i.root_idx) for i in indices), key=_order)),
            )
            for (node, handler), indices in pairs.items()
            if indices
        ]

    def why_absent(self, layer: nn.Module) -> str:
        """Why a layer is not in the graph, in words."""
        if not any(parameter in self.reached for parameter in layer.parameters(recurse=False)):
            return "does not reach the model's output"
        if layer not in self.called:
            return "never called: its weight is read directly"
        return "its output is changed in place and cannot be traced"


def _index(position: int, root: int) -> Any:
    """A position as the library's mappings take it."""
    from torch_pruning import _helpers

    return _helpers._HybridIndex(idx=position, root_idx=root)


def _order(pair: tuple[int, int | None]) -> tuple[int, int]:
    position, root = pair
    return position, -1 if root is None else root


def trace(model: nn.Module, inputs: Inputs) -> Traced:
    """Run the model once and build its dependency graph. Its parameters require gradients afterwards."""
    pruning = require("torch_pruning", "prune")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    graph = pruning.DependencyGraph()
    reached: set[Tensor] = set()
    called: set[nn.Module] = set()

    def outputs(output: Any) -> list[Tensor]:
        tensors = [t for t in tensors_in(output) if t.grad_fn is not None]
        reached.update(_leaves(tensors))
        return tensors

    with ExitStack() as hooks, torch.enable_grad(), warnings.catch_warnings():
        for module in model.modules():
            hooks.enter_context(module.register_forward_hook(lambda m, *_: called.add(m)))
        # It warns of parameters outside known layers; here a group that holds one raises instead.
        warnings.simplefilter("ignore")
        try:
            graph.build_dependency(
                model,
                example_inputs=inputs,
                forward_fn=call,
                output_transform=outputs,
                # Its default for this argument is shared between calls and models.
                unwrapped_parameters=[],
                customized_pruners={type(m): _conv1d_pruner(pruning) for m in model.modules() if is_transposed(m)},
            )
        except (AttributeError, KeyError, IndexError, TypeError, RuntimeError, AssertionError) as error:
            raise EdgetuneError(
                f"the model's layers could not be traced: {type(error).__name__}: {error}",
                action="check that model(example inputs) runs and returns tensors that need a gradient",
            ) from error
    return Traced(graph, frozenset(reached), frozenset(called))


def _leaves(outputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """The parameters that autograd would give a gradient."""
    waiting: list[Any] = [tensor.grad_fn for tensor in outputs]
    seen: set[Any] = set(waiting)
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            yield node.variable
        waiting += (new := {source for source, _ in node.next_functions if source is not None} - seen)
        seen |= new


def _conv1d_pruner(pruning: Any) -> Any:
    """The widths of a layer that the library does not know; it never cuts one."""

    class Conv1DPruner(pruning.BasePruningFunc):  # type: ignore[misc]
        def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            raise NotImplementedError

        def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            raise NotImplementedError

        def get_out_channels(self, layer: nn.Module) -> int:
            return width_of(layer, "out")

        def get_in_channels(self, layer: nn.Module) -> int:
            return width_of(layer, "in")

    return Conv1DPruner()
