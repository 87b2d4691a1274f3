"""What cuts left of a model's structure, as plain values: a checkpoint is loaded into the same structure again.

The history stands on the model itself, one entry for each cut: `{"layers": {name: {attribute: number or shape}}}`, or
`{"blocks": {list: {"of": its keys, "keep": positions}}}`. Names are those at that time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.prune.changes import Changes

_HISTORY = "edgetune_cuts"  # the attribute of a model with its history
_CONFIG = "edgetune_config_before_cuts"
_PENDING = "edgetune_pending_cuts"  # those of a stored model that is being rebuilt

Entry = dict[str, dict[str, Any]]


def history_of(model: nn.Module) -> list[Entry]:
    """The cuts that a model has seen, oldest first."""
    history: list[Entry] = getattr(model, _HISTORY, [])
    return history


def remember_config(model: nn.Module) -> None:
    """Keep the config of a model of transformers as it is before the first cut."""
    config: Any = getattr(model, "config", None)
    if not history_of(model) and callable(getattr(config, "to_json_string", None)):
        setattr(model, _CONFIG, json.loads(config.to_json_string(use_diff=False)))


def config_before(model: nn.Module) -> dict[str, Any] | None:
    """The config of a model of transformers before the first cut."""
    config: dict[str, Any] | None = getattr(model, _CONFIG, None)
    return config


def set_config_before(model: nn.Module, config: dict[str, Any] | None) -> None:
    """Give a model the config that it was cut from."""
    setattr(model, _CONFIG, config)


def set_history(model: nn.Module, history: Iterable[Entry]) -> None:
    """Give a model the history of the cuts that it is made by."""
    setattr(model, _HISTORY, list(history))


def add_entry(model: nn.Module, entry: Entry) -> None:
    """Add a cut to the history of a model."""
    set_history(model, [*history_of(model), entry])


def layers_entry(model: nn.Module, changes: Changes) -> Entry:
    """The entry of changes: the new number behind each attribute of a module, and the new shape of each tensor."""
    names = {module: name for name, module in model.named_modules()}
    layers: dict[str, dict[str, Any]] = {}
    for owner, attribute in changes.places():
        if isinstance(owner, nn.Module):
            value = getattr(owner, attribute)
            layers.setdefault(names[owner], {})[attribute] = list(value.shape) if isinstance(value, Tensor) else value
    return {"layers": layers}


def cut_as(model: nn.Module, entry: Entry) -> None:
    """Give the layers of an uncut model the shapes and numbers of an entry. Values are lost, where shapes differ.

    Raises `EdgetuneError` for a layer that the model lacks, or that is smaller already.
    """
    shared: dict[int, tuple[Tensor, Tensor]] = {}  # a tensor, and what it became for all layers that have it
    for name, values in entry["layers"].items():
        try:
            module = model.get_submodule(name)
            olds = {attribute: getattr(module, attribute) for attribute in values}
        except AttributeError as error:
            raise _misfit(name, str(error)) from error
        for attribute, value in values.items():
            old = olds[attribute]
            if not isinstance(old, Tensor):
                setattr(module, attribute, value)
            elif list(old.shape) != value:
                if old.dim() != len(value) or any(a < b for a, b in zip(old.shape, value, strict=True)):
                    raise _misfit(name, f"{attribute} {tuple(old.shape)} -> {tuple(value)}")
                new = torch.empty(value, dtype=old.dtype, device=old.device)
                if isinstance(old, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=old.requires_grad)
                setattr(module, attribute, shared.setdefault(id(old), (old, new))[1])


def _misfit(name: str, got: str) -> EdgetuneError:
    return EdgetuneError(
        f"{name} cannot be cut to what the checkpoint has", got=got, action="pass the model as it was before it was cut"
    )


def hand_over(model: nn.Module, history: Iterable[Entry]) -> None:
    """Leave the cuts of a stored model for `cut_next`, each technique's own."""
    setattr(model, _PENDING, [entry for entry in history if "layers" in entry])


def cut_next(model: nn.Module) -> nn.Module:
    """Make the next cut that was handed over. Raises `EdgetuneError` if there is none."""
    pending: list[Entry] = getattr(model, _PENDING, [])
    if not pending:
        raise EdgetuneError("the stored model has no record of its cuts", action="run its recipe again")
    cut_as(model, pending[0])
    add_entry(model, pending.pop(0))
    return model
