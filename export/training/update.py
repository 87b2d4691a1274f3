"""Add the optimizer's update to the graph: parameters become state that it changes."""

from __future__ import annotations

import torch
from torch import fx

from edgetune.export.training.draft import Draft

aten = torch.ops.aten
LEARNING_RATE = "learning_rate"
MOMENTUM = "_momentum"  # suffix of a parameter's name for its momentum


def add_sgd(draft: Draft, gradients: dict[str, fx.Node], momentum: float) -> dict[str, fx.Node]:
    """Add SGD to the graph, with a scalar input `learning_rate`. Returns the new value of each tensor.

    As `torch.optim.SGD`: `v = momentum * v + g; p = p - learning_rate * v`; without momentum, `v = g`.
    """
    rate = draft.input(LEARNING_RATE, torch.zeros(()))
    updates: dict[str, fx.Node] = {}
    for target, gradient in gradients.items():
        parameter = draft.placeholder_of(target)
        velocity = draft.buffer(target + MOMENTUM, torch.zeros_like(draft.tensors[target])) if momentum else None
        with draft.inserting_before(draft.graph.output_node()):
            if velocity is not None:
                gradient = draft.call(aten.add.Tensor, draft.call(aten.mul.Tensor, velocity, momentum), gradient)
                updates[target + MOMENTUM] = gradient
            step = draft.call(aten.mul.Tensor, gradient, rate)
            updates[target] = draft.call(aten.sub.Tensor, parameter, step)
    return updates
