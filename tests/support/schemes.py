"""Rows that a small net can learn, for the tests of what trains."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from edgetune.core.inputs import Inputs


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels)


def rows(count: int, seed: int) -> list[tuple[Inputs, Tensor]]:
    """Batches of eight vectors; the class is that of the largest of three sums, which a net can learn."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 32, generator=generator)
    labels = torch.stack([inputs[:, :8].sum(1), inputs[:, 8:16].sum(1), inputs[:, 16:].sum(1)]).argmax(0)
    return [(inputs[n : n + 8], labels[n : n + 8]) for n in range(0, count, 8)]
