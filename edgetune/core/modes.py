"""Context managers that restore a model's modes, buffers, trainability and the random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from edgetune.core.inputs import device_of


@contextmanager
def preserve_state(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Switch to evaluation (or training) mode; restore each module's mode, the buffers and the random state.

    Buffers are only saved in training mode. For a model that writes to them in evaluation mode, add `preserve_buffers`.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = device_of(model)
    keep_buffers = preserve_buffers(model) if training else nullcontext()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), keep_buffers:
        model.train(training)
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def preserve_trainability(model: nn.Module) -> Iterator[None]:
    """Restore each parameter's `requires_grad`."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@contextmanager
def preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Restore every buffer that the body writes or replaces."""
    held = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, before in held:
                module._buffers[name] = buffer
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
