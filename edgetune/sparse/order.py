"""The order in which a model's layers run, for models without a list of like blocks."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import call
from edgetune.core.modes import preserve_buffers, preserve_state
from edgetune.core.technique import Sample


def running_order(model: nn.Module, names: Iterable[str], sample: Sample | None) -> list[str]:
    """The layers of these names by when each is first called on the sample's inputs; those never called come first.

    A model of nested `nn.Sequential` runs as it is written and needs no sample; for any other one, `EdgetuneError` is
    raised if none is given.
    """
    names = list(names)
    if _is_written_in_order(model):
        return names
    if sample is None:
        raise EdgetuneError(
            "this model has no list of equal blocks, so its layers are ordered as they run",
            action="pass sample=et.Sample.of(example_inputs) to et.apply, or write the scheme out",
        )
    called: list[str] = []

    def note(name: str) -> Any:
        return lambda *_: called.append(name)

    with ExitStack() as hooks, preserve_state(model), preserve_buffers(model), torch.no_grad():
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(note(name)))
        call(model, sample.inputs)
    first = {name: index for index, name in reversed(list(enumerate(called)))}
    return sorted(names, key=lambda name: first.get(name, -1))


def _is_written_in_order(model: nn.Module) -> bool:
    """Whether every module that holds others is a Sequential, which calls them as they are written."""
    return all(type(module) is nn.Sequential for module in model.modules() if any(True for _ in module.children()))
