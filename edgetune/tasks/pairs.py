"""Pairs, such as an image and its text: the loss of two towers that are to agree."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from edgetune.core.errors import EdgetuneError


def contrastive_loss(similarities: Tensor, labels: Tensor | None = None) -> Tensor:
    """Mean of the cross entropies of each row's and each column's own partner among those of the batch; a scalar.

    `similarities` `(batch, batch)` are scaled: `logits_per_image` of CLIP's output. `labels`: the column of each row's
    partner; by default row n and column n are a pair. Radford et al., 2021, arXiv:2103.00020, figure 3.
    """
    rows = len(similarities)
    if similarities.shape != (rows, rows):
        raise EdgetuneError(
            "the similarities of a batch of pairs are as many rows as columns",
            got=tuple(similarities.shape),
            action="give model(**inputs).logits_per_image, with one text for each image",
        )
    partner = torch.arange(rows, device=similarities.device) if labels is None else labels
    inverse = partner.argsort()  # of each column: its row
    return (functional.cross_entropy(similarities, partner) + functional.cross_entropy(similarities.T, inverse)) / 2
