"""Refit the layers that read what is cut, in closed form: the inputs that stay stand in for those that go.

With inputs of covariance C, the weights W' of least squares on the inputs K that stay are
W_K + W_D C_DK (C_KK + d I)^-1, where D go: what OBS does for one weight (Hassibi and Stork, 1992), for whole columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgetune.core.inputs import Inputs, call, token_mask
from edgetune.core.modes import preserve_state
from edgetune.prune.cut import dropped_positions, replacement
from edgetune.prune.groups import Cut
from edgetune.prune.importance import can_fold_mean, rows_read
from edgetune.prune.layers import CONVOLUTIONS, axis_of, is_linear, weight_of, width_of

_DAMPING = 1e-2  # of the mean variance of the inputs that stay


@dataclass(frozen=True)
class Correction:
    """What is added to a reader's weight `(out, kept)` after the cut, and to its bias `(out,)` if it has one."""

    weight: Tensor
    bias: Tensor | None


def corrections(model: nn.Module, cuts: Sequence[Cut], batches: Iterable[Inputs]) -> dict[str, Correction]:
    """The corrections of every linear, and convolution of size 1, that reads what the cuts take, by name."""
    dropped = dropped_positions(cuts)
    read = {place.layer: positions for place, positions in dropped.items() if place.axis == "in"}
    written = {place.layer: positions for place, positions in dropped.items() if place.axis == "out"}
    layers = [name for name in read if _can_refit(model.get_submodule(name))]
    moments = _observe(model, layers, batches)
    return {
        name: _correction(model.get_submodule(name), read[name], written.get(name, set()), *moments[name])
        for name in moments
        if moments[name][0]
    }


def _can_refit(layer: nn.Module) -> bool:
    if isinstance(layer, CONVOLUTIONS):
        return layer.groups == 1 and set(layer.kernel_size) == {1} and axis_of(layer, "in") == 1
    return is_linear(layer)


def _observe(
    model: nn.Module, layers: Iterable[str], batches: Iterable[Inputs]
) -> dict[str, tuple[int, Tensor, Tensor]]:
    """Rows, their sum `(in,)` and that of x x' `(in, in)`, of the layers that are called."""
    moments: dict[str, tuple[int, Tensor, Tensor]] = {}
    mask: list[Tensor | None] = [None]
    with ExitStack() as hooks, preserve_state(model), torch.no_grad():
        for name in layers:
            zero = torch.zeros((), dtype=torch.float64)

            def look(layer: nn.Module, args: tuple[Tensor, ...], name: str = name, zero: Tensor = zero) -> None:
                rows = rows_read(layer, args[0], mask[0]).float()
                count, first, second = moments.get(name, (0, zero, zero))
                moments[name] = (
                    count + len(rows),
                    first + rows.double().sum(0).cpu(),
                    second + (rows.T @ rows).double().cpu(),
                )

            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(look))
        for inputs in batches:
            mask[0] = token_mask(inputs)
            call(model, inputs)
    return moments


def _correction(
    layer: nn.Module, read: set[int], written: set[int], rows: int, first: Tensor, second: Tensor
) -> Correction:
    gone = torch.tensor(sorted(read))
    stays = torch.tensor([n for n in range(width_of(layer, "in")) if n not in read])
    outputs = torch.tensor([n for n in range(width_of(layer, "out")) if n not in written])
    mean, covariance = first / rows, second / rows
    centred = can_fold_mean(layer)
    if centred:
        covariance = covariance - torch.outer(mean, mean)
    kept = covariance[stays][:, stays]
    kept = kept + _DAMPING * kept.diagonal().mean().clamp(min=1e-12) * torch.eye(len(stays), dtype=kept.dtype)
    weight = weight_of(layer).detach().double().cpu().flatten(1)[outputs]
    change = torch.linalg.solve(kept, covariance[stays][:, gone] @ weight[:, gone].T).T
    return Correction(change, -change @ mean[stays] if centred else None)


@torch.no_grad()
def refit(model: nn.Module, changes: Mapping[str, Correction]) -> None:
    """Add the corrections to the layers after the cut."""
    for name, change in changes.items():
        layer = model.get_submodule(name)
        if not bool(torch.isfinite(change.weight).all()):
            continue  # of activations without bounds, which importance has refused where it measured them
        weight = change.weight.T if axis_of(layer, "in") == 0 else change.weight
        layer.weight = replacement(layer.weight, layer.weight + weight.reshape(layer.weight.shape).to(layer.weight))  # type: ignore[assignment, arg-type, operator, union-attr]
        if change.bias is not None:
            layer.bias = replacement(layer.bias, layer.bias + change.bias.to(layer.bias))  # type: ignore[assignment, arg-type, operator, union-attr]
