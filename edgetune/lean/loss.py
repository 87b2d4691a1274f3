"""Cross entropy that saves the logits as they came, and only the rows whose label counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from edgetune.lean import head

_WORTH_A_COPY = 0.75  # up to this share of rows that count they are copied out; above it the logits themselves stay


class _CrossEntropy(torch.autograd.Function):
    """PyTorch saves the log-probabilities, a copy of the logits; here the logits do, which the model's output holds."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignored: int, reduction: str) -> Tensor:  # type: ignore[override]
        counts = target != ignored
        number = int(counts.sum())
        ctx.reduction, ctx.number = reduction, number
        few = number <= _WORTH_A_COPY * len(target)
        ctx.shape, ctx.few = logits.shape, few
        rows = (logits[counts], target[counts]) if few else (logits, target)
        ctx.save_for_backward(*rows, counts)
        return functional.cross_entropy(logits, target, ignore_index=ignored, reduction=reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, target, counts = ctx.saved_tensors
        wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
        for_logits = torch.softmax(logits, -1, dtype=wide)
        safe = target if ctx.few else target.where(counts, 0)
        for_logits.scatter_add_(1, safe.unsqueeze(1), for_logits.new_full((len(safe), 1), -1.0))
        scale = gradient.to(wide)
        if ctx.reduction == "mean":
            scale = scale / ctx.number
        if ctx.reduction == "none":
            for_logits.mul_((scale[counts] if ctx.few else scale * counts).unsqueeze(1))
        else:
            for_logits.mul_(scale if ctx.few else (scale * counts).unsqueeze(1))
        for_logits = for_logits.to(logits.dtype)
        if not ctx.few:
            return for_logits, None, None, None
        every_row = for_logits.new_zeros(ctx.shape)
        every_row[counts] = for_logits
        return every_row, None, None, None


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """`functional.cross_entropy`; class weights, smoothing, soft labels and further dimensions are PyTorch's."""
    common = weight is None and size_average is None and reduce is None and not label_smoothing
    rows = input.dim() == 2 and target.dim() == 1 and target.dtype == torch.int64 and len(input) > 0
    if not (input.requires_grad and common and rows and target.device == input.device):
        return functional.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    if reduction in ("mean", "sum") and head.head_of(input) is not None:
        return head.cross_entropy(input, target, ignore_index, reduction)  # type: ignore[arg-type]
    return _CrossEntropy.apply(input, target, ignore_index, reduction)  # type: ignore[no-any-return,no-untyped-call]
