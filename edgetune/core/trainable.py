"""Which parameters train: remembered by a technique before it changes them, put back when it is finalized."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from edgetune.core.errors import EdgetuneError

_ATTRIBUTE = "edgetune_trainable"  # on the model itself, so that it is copied and pickled with it


class _Note(NamedTuple):
    requires_grad: dict[str, bool]  # before the technique
    chooses: bool


def remember(model: nn.Module, owner: str, chooses: bool = False) -> None:
    """Note for the technique called `owner` what trains now. Raises if it is already applied.

    `chooses`: the technique chooses what of the plain layers trains, and those after it leave that as it is.
    """
    notes = _notes(model)
    if owner in notes:
        raise EdgetuneError(f"{owner} is already applied to this model", action="call et.finalize(model) first")
    state = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    setattr(model, _ATTRIBUTE, {**notes, owner: _Note(state, chooses)})


def recall(model: nn.Module, owner: str) -> None:
    """Put back what `owner` had remembered; parameters that are new or gone since are left alone."""
    notes = dict(_notes(model))
    note = notes.pop(owner, _Note({}, False))
    for name, parameter in model.named_parameters():
        if name in note.requires_grad and parameter.is_floating_point():
            parameter.requires_grad_(note.requires_grad[name])
    if notes:
        setattr(model, _ATTRIBUTE, notes)
    elif hasattr(model, _ATTRIBUTE):
        delattr(model, _ATTRIBUTE)


def is_chosen(model: nn.Module) -> bool:
    """Whether an open technique chose what of the plain layers trains."""
    return any(note.chooses for note in _notes(model).values())


def _notes(model: nn.Module) -> dict[str, _Note]:
    notes: dict[str, _Note] = getattr(model, _ATTRIBUTE, {})
    return notes
