"""A model's layers as a graph, by torch-pruning; and what belongs to tracing: modes, rows, outputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.prune.layers import is_conv1d, width_of
from edgetune.registry import require
from edgetune.technique import EdgetuneError, Inputs, call, rows_of, tensors_of


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; train/eval mode and trainability of every part as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, wanted in trainable.items():
            parameter.requires_grad_(wanted)


def tensors_in(output: Any) -> list[Tensor]:
    """Every floating-point tensor a model returned, in order; caches and other objects are passed over."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = tuple(output.values())
    return [t for value in output for t in tensors_in(value)] if isinstance(output, (tuple, list)) else []


def first_rows(inputs: Inputs) -> Inputs:
    """Two rows, where every tensor has one for each example: a graph needs no more."""
    tensors = tensors_of(inputs)
    rows = {t.shape[0] if isinstance(t, Tensor) and t.dim() else 0 for t in tensors}
    return rows_of(inputs, 0, 2) if len(rows) == 1 and rows.pop() > 2 else inputs


def trace(model: nn.Module, inputs: Inputs) -> tuple[Any, set[Tensor]]:
    """The graph, and every parameter that the output depends on."""
    pruning = require("torch_pruning", "prune")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    graph = pruning.DependencyGraph()
    reached: set[Tensor] = set()

    def outputs(output: Any) -> list[Tensor]:
        tensors = [t for t in tensors_in(output) if t.grad_fn is not None]
        reached.update(_leaves(tensors))
        return tensors

    with torch.enable_grad(), warnings.catch_warnings():
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
                customized_pruners={type(m): _conv1d_pruner(pruning) for m in model.modules() if is_conv1d(m)},
            )
        except (AttributeError, KeyError, IndexError, TypeError, RuntimeError, AssertionError) as error:
            raise EdgetuneError(
                f"the model's layers could not be traced: {type(error).__name__}: {error}",
                action="check that model(example inputs) runs and returns tensors that need a gradient",
            ) from error
    return graph, reached


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
    """What the library asks about a layer it does not know: its widths. It is never let cut."""

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
