"""How far the predictions of one model are from those of another."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def mean_divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the distributions of `logits` from those of `target`, in nats, the mean over all
    but the last dim `(..., classes)`."""
    ours, theirs = (each.log_softmax(-1).flatten(0, -2) for each in (logits, target))
    return functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
