"""Add the optimizer's update to the graph: parameters and what the optimizer keeps become state that it changes."""

from __future__ import annotations

import math

import torch
from torch import fx

from edgetune.export.training.capture import CHILD
from edgetune.export.training.draft import Draft
from edgetune.program.manifest import EXP_AVG, EXP_AVG_SQ, MOMENTUM, STEP, UpdateRule

aten = torch.ops.aten
LEARNING_RATE = "learning_rate"
PARTS = (MOMENTUM, EXP_AVG_SQ, EXP_AVG)  # endings of a parameter's name


def parameter_of(target: str) -> str:
    """The parameter that a tensor of the state belongs to, by their names."""
    return next((target.removesuffix(part) for part in PARTS if target.endswith(part)), target)


def add_optimizer(draft: Draft, gradients: dict[str, fx.Node], optimizer: UpdateRule) -> dict[str, fx.Node]:
    """Add the update to the graph, with a scalar input `learning_rate`. Returns the new value of each tensor."""
    rate = draft.input(LEARNING_RATE, torch.zeros(()))
    if optimizer.name == "adamw":
        return _add_adamw(draft, gradients, rate, optimizer)
    return _add_sgd(draft, gradients, rate, optimizer.momentum)


def _add_sgd(draft: Draft, gradients: dict[str, fx.Node], rate: fx.Node, momentum: float) -> dict[str, fx.Node]:
    """As `torch.optim.SGD`: `v = momentum * v + g; p = p - learning_rate * v`; without momentum, `v = g`."""
    updates: dict[str, fx.Node] = {}
    for target, gradient in gradients.items():
        parameter = draft.placeholder_of(target)
        velocity = _state(draft, target, MOMENTUM) if momentum else None
        with draft.inserting_before(draft.graph.output_node()):
            if velocity is not None:
                gradient = draft.call(aten.add.Tensor, draft.call(aten.mul.Tensor, velocity, momentum), gradient)
                updates[target + MOMENTUM] = gradient
            step = draft.call(aten.mul.Tensor, gradient, rate)
            updates[target] = draft.call(aten.sub.Tensor, parameter, step)
    return updates


def _add_adamw(draft: Draft, gradients: dict[str, fx.Node], rate: fx.Node, optimizer: UpdateRule) -> dict[str, fx.Node]:
    """As `torch.optim.AdamW` (Loshchilov and Hutter, 2019, arXiv:1711.05101, algorithm 2).

    `m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; p = p (1 - lr decay) - lr c m / (sqrt(v) + c' eps)` with
    `c' = sqrt(1 - b2^t)` and `c = c' / (1 - b1^t)`. Tensors of one dimension, biases and norms, are not decayed.
    """
    beta1, beta2 = optimizer.betas
    count = draft.buffer(f"{CHILD}.{STEP}", torch.zeros(()))
    states = {target: (_state(draft, target, EXP_AVG), _state(draft, target, EXP_AVG_SQ)) for target in gradients}
    updates: dict[str, fx.Node] = {}
    with draft.inserting_before(draft.graph.output_node()):

        def mul(one: fx.Node, other: fx.Node | float) -> fx.Node:
            return draft.call(aten.mul.Tensor, one, other)

        def blend(old: fx.Node, beta: float, new: fx.Node) -> fx.Node:
            return draft.call(aten.add.Tensor, mul(old, beta), mul(new, 1 - beta))

        def correction(beta: float) -> fx.Node:  # 1 - beta^t, exact where it is small
            power = draft.call(aten.expm1.default, mul(updates[f"{CHILD}.{STEP}"], math.log(beta)))
            return mul(power, -1.0)

        updates[f"{CHILD}.{STEP}"] = draft.call(aten.add.Tensor, count, 1.0)
        root = draft.call(aten.sqrt.default, correction(beta2))
        step_size = draft.call(aten.div.Tensor, mul(rate, root), correction(beta1))
        eps = mul(root, optimizer.eps)
        decayed = mul(rate, optimizer.weight_decay) if optimizer.weight_decay else None
        for target, gradient in gradients.items():
            parameter, (mean, square) = draft.placeholder_of(target), states[target]
            mean = updates[target + EXP_AVG] = blend(mean, beta1, gradient)
            square = updates[target + EXP_AVG_SQ] = blend(square, beta2, mul(gradient, gradient))
            divisor = draft.call(aten.add.Tensor, draft.call(aten.sqrt.default, square), eps)
            step = mul(draft.call(aten.div.Tensor, mean, divisor), step_size)
            if decayed is not None and draft.tensors[target].dim() >= 2:
                step = draft.call(aten.add.Tensor, step, mul(parameter, decayed))
            updates[target] = draft.call(aten.sub.Tensor, parameter, step)
    return updates


def _state(draft: Draft, target: str, part: str) -> fx.Node:
    """What the optimizer keeps for a parameter, zeros at first."""
    return draft.buffer(target + part, torch.zeros_like(draft.tensors[target]))
