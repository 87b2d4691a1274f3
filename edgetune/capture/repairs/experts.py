"""Mixtures of experts by operators of fixed shape.

transformers sorts tokens by expert and multiplies group by group, with sizes known only at run time; no backend has
that operator. Its `batched_mm` form selects each token's weights and multiplies in one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_SETTING = "_experts_implementation_internal"
_STATIC = "batched_mm"


@contextmanager
def static_experts(model: nn.Module) -> Iterator[None]:
    """While the body runs, every mixture of experts in `model` uses operators of fixed shape."""
    settings: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, _SETTING) and id(config) not in settings:
            settings[id(config)] = config, getattr(config, _SETTING)
    try:
        for config, _ in settings.values():
            setattr(config, _SETTING, _STATIC)
        yield
    finally:
        for config, before in settings.values():
            setattr(config, _SETTING, before)
