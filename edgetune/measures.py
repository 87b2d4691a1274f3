"""What the ledger says of any model: counted, not guessed, and the same for every technique."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edgetune.quant.size import parameter_count, stored_bytes
from edgetune.sparse.kept import kept_bytes
from edgetune.technique import Inputs, call, logits_of

MIB = 2**20
Loss = Callable[[Tensor, Tensor], Tensor]


class Measures(NamedTuple):
    """The columns of a ledger row that belong to the model alone."""

    parameters: int
    trainable_parameters: int
    size_mib: float
    macs: int
    backward_kept_mib: float


def measure(model: nn.Module, inputs: Inputs, batch: tuple[Inputs, Tensor], loss: Loss) -> Measures:
    """Count `model`: MACs on `inputs` (one example), bytes kept for backward on `batch` (inputs, labels)."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Measures(
        parameters=parameter_count(model),
        trainable_parameters=trainable,
        size_mib=stored_bytes(model) / MIB,
        macs=count_macs(model, inputs),
        backward_kept_mib=kept_mib(model, batch, loss) if trainable else 0.0,
    )


def count_macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-accumulates of one forward, by torch's own counter (which counts two operations for each)."""
    counter = FlopCounterMode(display=False)
    with _quiet(model, training=False), torch.no_grad(), counter:
        call(model, inputs)
    return int(counter.get_total_flops()) // 2


def kept_mib(model: nn.Module, batch: tuple[Inputs, Tensor], loss: Loss) -> float:
    """MiB that one training forward keeps for backward, parameters not counted."""
    inputs, labels = batch
    with _quiet(model, training=True):
        return kept_bytes(model, inputs, lambda output: loss(logits_of(output), labels)) / MIB


class _quiet:
    """Sets train or eval mode, and gives back the modes, the buffers and the random state as they were."""

    def __init__(self, model: nn.Module, training: bool) -> None:
        self.model, self.training = model, training

    def __enter__(self) -> None:
        self.modes = [(m, m.training) for m in self.model.modules()]
        self.buffers = copy.deepcopy(dict(self.model.named_buffers())) if self.training else {}
        self.random = torch.get_rng_state()
        self.model.train(self.training)

    def __exit__(self, *_: object) -> None:
        for module, mode in self.modes:
            module.training = mode
        current = dict(self.model.named_buffers())
        for name, value in self.buffers.items():
            current[name].data.copy_(value)
        torch.set_rng_state(self.random)
