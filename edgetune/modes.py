"""Looking at a model without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from edgetune.technique import device_of


@contextmanager
def undisturbed(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Evaluation (or training) mode inside; each module's own mode, the buffers and the random state are put back.

    Buffers are only kept where they can change, which is in training mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()} if training else {}
    device = device_of(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.train(training)
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                current = dict(model.named_buffers())
                for name, value in buffers.items():
                    current[name].copy_(value)
