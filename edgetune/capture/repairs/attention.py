"""Scaled dot-product attention, in operators that backends take."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention `(..., length, head)` in operators that XNNPACK takes.

    The stock decomposition tests whether a row is masked completely, which splits attention into two delegates and five
    portable operators. Here a masked place gets half of the lowest finite number instead of -inf. The
    result only differs for a completely masked row: the mean of the values instead of zeros.
    """
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    lowest = torch.finfo(query.dtype).min / 2
    form, groups = query.shape, query.size(-3) // key.size(-3) if enable_gqa else 1
    if groups > 1:  # the heads of a group as further rows of one head: nothing is copied
        query = query.reshape(*form[:-3], form[-3] // groups, groups * form[-2], form[-1])
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    rows = scores.shape
    scores = scores.reshape(*form[:-1], rows[-1]) if groups > 1 else scores
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
        scores = scores + torch.where(hidden, lowest, 0.0).to(query.dtype)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores + torch.where(attn_mask, 0.0, lowest).to(query.dtype)
    elif attn_mask is not None:
        scores = scores + attn_mask.clamp(min=lowest)
    shares = torch.softmax(scores, -1)
    if groups == 1:
        return torch.matmul(shares, value)
    return torch.matmul(shares.reshape(rows), value).reshape(*form[:-1], value.size(-1))


REPAIRS: dict[Any, Any] = {torch.ops.aten.scaled_dot_product_attention.default: attention}
