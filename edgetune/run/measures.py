"""Measures of any model for the ledger: counted, not estimated, and the same for every technique."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edgetune.core.inputs import Inputs, call, logits_of
from edgetune.core.modes import preserve_state
from edgetune.core.numbers import MIB
from edgetune.lean.saved import saved_bytes
from edgetune.quant.size import parameter_count, stored_bytes

Loss = Callable[[Tensor, Tensor], Tensor]


class Measures(NamedTuple):
    """The columns of a ledger row that describe the model."""

    parameters: int
    trainable_parameters: int
    size_mib: float
    macs: int
    saved_for_backward_mib: float


def join_notes(notes: Iterable[str]) -> str:
    """One note of several, without the empty ones."""
    return "; ".join(filter(None, notes))


def measure(model: nn.Module, inputs: Inputs, batch: tuple[Inputs, Tensor], loss: Loss) -> Measures:
    """Measure `model`: MACs of `inputs` (one example), bytes saved for backward by `batch` (inputs, labels)."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Measures(
        parameters=parameter_count(model),
        trainable_parameters=trainable,
        size_mib=stored_bytes(model) / MIB,
        macs=count_macs(model, inputs),
        saved_for_backward_mib=saved_mib(model, batch, loss) if trainable else 0.0,
    )


def count_macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-accumulates of one forward, by torch's own counter (which counts two operations for each)."""
    counter = FlopCounterMode(display=False, custom_mapping=_packed_products())
    with preserve_state(model), torch.no_grad(), counter:
        call(model, inputs)
    return int(counter.get_total_flops()) // 2


def _packed_products() -> dict[Any, Any]:
    """The product of bitsandbytes' 4-bit layers, which torch's counter does not count; {} if they are not loaded."""
    product = getattr(torch.ops.bitsandbytes, "gemm_4bit", None)
    if product is None:
        return {}

    def flops(inputs: tuple[int, ...], _: object, weight: tuple[int, ...], *__: object, **___: object) -> int:
        return 2 * math.prod(inputs) * weight[0]  # weight: the shape (out, in)

    return {product: flops}


def saved_mib(model: nn.Module, batch: tuple[Inputs, Tensor], loss: Loss) -> float:
    """MiB that one training forward saves for backward, parameters not counted."""
    inputs, labels = batch
    return saved_bytes(model, inputs, lambda output: loss(logits_of(output), labels)) / MIB
