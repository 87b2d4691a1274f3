"""The optimizer's update becomes part of the graph: gradients are no outputs, parameters are state that it changes."""

from __future__ import annotations

import torch
from torch import fx

from edgetune.export.training.draft import Draft

aten = torch.ops.aten
LEARNING_RATE = "learning_rate"
MOMENTUM = "_momentum"  # what follows a parameter's name in that of its momentum


def updates(draft: Draft, gradients: dict[str, fx.Node], momentum: float) -> dict[str, fx.Node]:
    """Add SGD to the graph, with an input `learning_rate`, a scalar. Returns what is to be written into which tensor.

    As `torch.optim.SGD`: `v = momentum * v + g; p = p - learning_rate * v`; without momentum, `v = g`.
    """
    rate = draft.input(LEARNING_RATE, torch.zeros(()))
    found: dict[str, fx.Node] = {}
    for target, gradient in gradients.items():
        parameter = draft.holder(target)
        velocity = draft.buffer(target + MOMENTUM, torch.zeros_like(draft.tensors[target])) if momentum else None
        with draft.before(draft.graph.output_node()):
            if velocity is not None:
                gradient = draft.call(aten.add.Tensor, draft.call(aten.mul.Tensor, velocity, momentum), gradient)
                found[target + MOMENTUM] = gradient
            step = draft.call(aten.mul.Tensor, gradient, rate)
            found[target] = draft.call(aten.sub.Tensor, parameter, step)
    return found
