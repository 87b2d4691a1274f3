"""What the loss says of each unit: the derivative by a gate on it, where the layers that read the unit are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs, call, logits_of, rows_of, tensors_of
from edgetune.core.modes import preserve_state, preserve_trainability
from edgetune.prune.groups import Group, Member
from edgetune.prune.importance import positions_read
from edgetune.prune.layers import channel_dimension

Derivative = Literal["taylor", "fisher"]


def gate_scores(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Iterable[tuple[Inputs, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    derivative: Derivative,
) -> dict[str, Tensor]:
    """Scores `(units,)` of each group: over training rows, the mean of |g| (taylor) or of its square (fisher).

    g is the derivative of a row's loss by a gate on the unit, that is the sum of x dL/dx over all that reads it.
    Taylor: Molchanov et al., 2019, arXiv:1906.10771. Fisher: Kwon et al., 2022, arXiv:2204.09656, equation 10.
    """
    sums = {group.name: torch.zeros(group.units, dtype=torch.float64) for group in groups}
    rows = 0
    with preserve_state(model), preserve_trainability(model), torch.enable_grad():
        model.requires_grad_(False)
        for inputs, labels in batches:
            if not rows:
                _refuse_other_layouts(model, groups, inputs)
            count = len(tensors_of(inputs)[0])
            gates = {group.name: torch.ones(count, group.units, requires_grad=True) for group in groups}
            with ExitStack() as hooks:
                for group in groups:
                    for member in group.along("in"):
                        layer = model.get_submodule(member.layer)
                        hook = _gate(layer, member, gates[group.name])
                        hooks.enter_context(layer.register_forward_pre_hook(hook))
                value = loss(logits_of(call(model, inputs)), labels)
            gradients = torch.autograd.grad(value, list(gates.values()), allow_unused=True)
            for name, gradient in zip(gates, gradients, strict=True):
                if gradient is not None:
                    by_row = gradient.double() * count  # the loss is the mean of the rows'
                    sums[name] += (by_row.abs() if derivative == "taylor" else by_row.square()).sum(0)
            rows += count
    if not rows:
        message = "there are no labelled batches for derivatives of the loss"
        raise EdgetuneError(message, action="pass a Sample with labelled batches")
    return {name: total / rows for name, total in sums.items()}


def _refuse_other_layouts(model: nn.Module, groups: Sequence[Group], inputs: Inputs) -> None:
    """Raise for a layer whose inputs do not begin with the rows of the batch."""
    lengths: dict[str, list[int]] = {member.layer: [] for group in groups for member in group.along("in")}
    for count in (1, 2):
        with ExitStack() as hooks, torch.no_grad():
            for name, seen in lengths.items():
                hook = partial(_note_length, seen)
                hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(hook))
            call(model, rows_of(inputs, 0, count))
    for name, (*ones, last) in ((name, seen) for name, seen in lengths.items() if seen):
        if len(tensors_of(inputs)[0]) > 1 and last != 2 * ones[0]:
            raise EdgetuneError(
                f"the inputs of {name} do not begin with the rows of a batch, so the loss of each cannot be told apart",
                action="importance: activation",
            )


def _note_length(seen: list[int], _: nn.Module, args: tuple[Tensor, ...]) -> None:
    seen.append(len(args[0]))


def _gate(layer: nn.Module, member: Member, gate: Tensor) -> Callable[..., Any]:
    """A hook that multiplies the inputs of each unit by its gate, row by row."""
    positions = torch.tensor(positions_read(layer, member))
    units = torch.arange(len(positions)).repeat_interleave(positions.shape[1])

    def multiply(_: nn.Module, args: tuple[Tensor, ...]) -> Any:
        x = args[0]
        dim = channel_dimension(layer)
        ones = torch.ones(len(gate), x.shape[dim], dtype=gate.dtype)
        factors = ones.index_copy(1, positions.flatten(), gate[:, units])
        factors = factors.repeat_interleave(len(x) // len(gate), 0).to(x)
        shape = [len(x), *[1] * (x.dim() - 1)]
        shape[dim] = x.shape[dim]
        return (x * factors.view(shape), *args[1:])

    return multiply
