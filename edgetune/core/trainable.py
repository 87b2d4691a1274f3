"""Which parameters train: saved by a technique before it changes them, and restored when it is finalized."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import unwrapped_name

_ATTRIBUTE = "edgetune_trainable"  # on the model itself, so that it is copied and pickled with it


class _Note(NamedTuple):
    requires_grad: dict[str, bool]  # before the technique
    chooses: bool


def remember(model: nn.Module, owner: str, chooses: bool = False) -> None:
    """Save which parameters train, for the technique `owner`. Raises if it is already applied.

    `chooses`: the technique decides which plain layers train, and later techniques leave that as it is.
    """
    notes = _notes(model)
    if owner in notes:
        raise EdgetuneError(f"{owner} is already applied to this model", action="call et.finalize(model) first")
    state = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    setattr(model, _ATTRIBUTE, {**notes, owner: _Note(state, chooses)})


def recall(model: nn.Module, owner: str) -> None:
    """Restore what `owner` saved; parameters that were added or removed since are left alone."""
    notes = dict(_notes(model))
    note = notes.pop(owner, _Note({}, False))
    for name, parameter in model.named_parameters():
        before = note.requires_grad.get(name, note.requires_grad.get(unwrapped_name(name)))
        if before is not None and parameter.is_floating_point():
            parameter.requires_grad_(before)
    if notes:
        setattr(model, _ATTRIBUTE, notes)
    elif hasattr(model, _ATTRIBUTE):
        delattr(model, _ATTRIBUTE)


def is_chosen(model: nn.Module) -> bool:
    """Whether an open technique decided which plain layers train."""
    return any(note.chooses for note in _notes(model).values())


def _notes(model: nn.Module) -> dict[str, _Note]:
    notes: dict[str, _Note] = getattr(model, _ATTRIBUTE, {})
    return notes
