"""Shared by both callbacks: log what trains at the start, and finalize at the end."""

from __future__ import annotations

import logging

from torch import nn

from edgetune.core.apply import active_techniques, finalize
from edgetune.core.errors import EdgetuneError
from edgetune.core.holders import unwrap_model

_log = logging.getLogger(__name__)


def announce(root: nn.Module) -> str:
    """Log, and return, which techniques are open in `root` and how many parameters train.

    Raises `EdgetuneError` if no technique is open, or nothing trains: the callback would do nothing.
    """
    names = [technique.name for module in root.modules() for technique in active_techniques(module)]
    if not names:
        raise EdgetuneError(
            "no technique is applied to this model", action="call et.apply(model, [...]) before the training"
        )
    total = sum(parameter.numel() for parameter in root.parameters())
    trainable = sum(parameter.numel() for parameter in root.parameters() if parameter.requires_grad)
    if not trainable:
        raise EdgetuneError("no parameter of the model is trainable", action="apply lora or sparse-update")
    share = 100 * trainable / total
    share_pct = f"{share:{'.0f' if share >= 10 else '.2g'}}"
    summary = f"{', '.join(names)}: {trainable:,} of {total:,} parameters train ({share_pct} %)"
    _log.info(summary)
    return summary


def finalize_inside(root: nn.Module) -> None:
    """Finalize `root` and every module in it that has open techniques, in place."""
    if unwrap_model(finalize(root)) is not unwrap_model(root):
        raise EdgetuneError(
            "the model itself is a layer that edgetune must replace",
            action="leave out the callback and call et.finalize",
        )
