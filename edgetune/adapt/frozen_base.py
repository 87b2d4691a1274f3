"""The base under an adapter: frozen, unless an open technique chose what trains, and afterwards as it was."""

from __future__ import annotations

from torch import nn

from edgetune.core import trainable
from edgetune.lean.frozen import FrozenLayer, freeze_batch_norms, remove_hooks
from edgetune.lean.reads import FirstForward


def freeze_base(model: nn.Module, owner: str) -> None:
    """Freeze what no open technique chose to train, and keep frozen batch norms on their statistics."""
    trainable.remember(model, owner)
    if not trainable.is_chosen(model):
        model.requires_grad_(False)
    freeze_batch_norms(model)


def restore_base(model: nn.Module, owner: str) -> None:
    """Make trainable again what was before, and remove the hooks."""
    keep = trainable.is_chosen(model)  # the technique that chose keeps its batch norms frozen
    remove_hooks(model, FirstForward if keep else (FirstForward, FrozenLayer))
    trainable.recall(model, owner)
