"""The optimizer of a training program: its settings, checked, and PyTorch's own with the same."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.program.manifest import UpdateRule

_OWN = {"sgd": ("momentum",), "adamw": ("betas", "weight_decay")}  # settings


def choose_optimizer(
    name: Literal["sgd", "adamw"], momentum: float, betas: tuple[float, float], weight_decay: float
) -> UpdateRule:
    """The optimizer of these settings. Raises `EdgetuneError` (exit code 2) for one that it does not have."""
    if name not in _OWN:
        raise EdgetuneError("unknown optimizer", got=name, allowed=[*_OWN], exit_code=Exit.USAGE)
    default, given = UpdateRule(), {"momentum": momentum, "betas": tuple(betas), "weight_decay": weight_decay}
    for setting, value in given.items():
        if setting not in _OWN[name] and value != getattr(default, setting):
            raise EdgetuneError(
                f"{name} has no {setting}", got=value, action="leave it out, or take the other optimizer",
                exit_code=Exit.USAGE,
            )  # fmt: skip
    allowed = {
        "momentum": (0 <= momentum < 1, "from 0 to below 1"),
        "betas": (len(betas) == 2 and all(0 < beta < 1 for beta in betas), "two numbers between 0 and 1"),
        "weight_decay": (weight_decay >= 0, "0 or more"),
    }
    for setting, (fits, words) in allowed.items():
        if not fits:
            raise EdgetuneError(f"{setting} is out of range", got=given[setting], allowed=[words], exit_code=Exit.USAGE)
    return UpdateRule(name=name, momentum=momentum, betas=betas, weight_decay=weight_decay)


def eager_like(optimizer: UpdateRule, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """PyTorch's optimizer of the model's trainable parameters, as the program has it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if optimizer.name == "sgd":
        return torch.optim.SGD(trained, learning_rate, optimizer.momentum)
    matrices, vectors = ([p for p in trained if (p.dim() >= 2) == wide] for wide in (True, False))
    decays = ((matrices, optimizer.weight_decay), (vectors, 0.0))
    groups = [{"params": group, "weight_decay": decay} for group, decay in decays if group]
    return torch.optim.AdamW(groups, learning_rate, optimizer.betas, optimizer.eps)
