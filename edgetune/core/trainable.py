"""Which parameters train: remembered by a technique before it changes them, put back when it is finalized."""

from __future__ import annotations

from torch import nn

from edgetune.core.errors import EdgetuneError

_ATTRIBUTE = "edgetune_trainable"  # on the model itself, so that it is copied and pickled with it


def remember(model: nn.Module, owner: str) -> None:
    """Note for the technique called `owner` what trains now. Raises if it is already applied."""
    notes: dict[str, dict[str, bool]] = getattr(model, _ATTRIBUTE, {})
    if owner in notes:
        raise EdgetuneError(f"{owner} is already applied to this model", action="call et.finalize(model) first")
    state = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    setattr(model, _ATTRIBUTE, {**notes, owner: state})


def recall(model: nn.Module, owner: str) -> None:
    """Put back what `owner` had remembered; parameters that are new or gone since are left alone."""
    notes: dict[str, dict[str, bool]] = dict(getattr(model, _ATTRIBUTE, {}))
    state = notes.pop(owner, {})
    for name, parameter in model.named_parameters():
        if name in state and parameter.is_floating_point():
            parameter.requires_grad_(state[name])
    if notes:
        setattr(model, _ATTRIBUTE, notes)
    elif hasattr(model, _ATTRIBUTE):
        delattr(model, _ATTRIBUTE)


def is_open(model: nn.Module, owner: str) -> bool:
    """Whether the technique called `owner` has been applied and not yet finalized."""
    return owner in getattr(model, _ATTRIBUTE, {})
