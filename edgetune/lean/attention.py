"""Scaled dot-product attention that saves query, key, value and a seed, and never the scores.

PyTorch saves the scores as soon as there is dropout (on a CPU three times: before and after dropout, and the mask),
and a bool mask once more in floats for each layer. Here the scores are computed again in backward, some heads at a
time. Long rows without dropout go through PyTorch's flash kernel, which saves its output and one number per row too
(Dao et al., 2022, arXiv:2205.14135, is the kernel's idea).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from edgetune.lean.packing import autocast_dtype, dropout_noise, make_generator, new_seed, no_autocast, wide_enough
from edgetune.lean.producers import LastActivation

aten = torch.ops.aten
_CHUNK = 2**17  # scores computed at once, half a MiB in fp32: they stay in the cache
_SHORT = 256 * 256  # scores per head up to which computing them again is as fast as the flash kernel's backward


class _Scores:
    """The probabilities of some rows and heads, computed again from the same query, key and mask."""

    def __init__(self, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> None:
        self.is_causal, self.scale, self.groups = is_causal, scale, query.shape[1] // key.shape[1]
        self.mask = mask if mask is None or mask.dim() == 4 else mask[(None,) * (4 - mask.dim())]
        self.shape = (*query.shape[:3], key.shape[2])
        self.triangle = query.new_full(self.shape[2:], -math.inf).triu_(1) if is_causal else None

    def pieces(self) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
        """Rows and heads of the query, and of key and value: whole groups, as many as fit into a chunk."""
        batch, heads, queries, keys = self.shape
        groups, at_once = self.groups, max(1, _CHUNK // (queries * keys))
        heads_step = max(1, at_once // groups) * groups
        rows_step = max(1, at_once // heads)
        for row in range(0, batch, rows_step):
            for head in range(0, heads, heads_step):
                rows, stop = slice(row, min(row + rows_step, batch)), min(head + heads_step, heads)
                yield (rows, slice(head, stop)), (rows, slice(head // groups, stop // groups))

    def expand_heads(self, x: Tensor, part: tuple[slice, slice]) -> Tensor:
        """Key or value of these rows and heads, once for each head of the query: `(rows * heads, tokens, width)`."""
        return wide_enough(_repeat_heads(x[part], self.groups)).flatten(0, 1)

    def probabilities(self, query: Tensor, key: Tensor, part: tuple[slice, slice]) -> Tensor:
        """`(rows * heads, queries, keys)`; a query that may look nowhere has zeros."""
        scores = torch.bmm(query * self.scale, key.transpose(1, 2))
        added = self.triangle if self.mask is None else self._mask_term(part, scores)
        if added is None:
            return torch.softmax(scores, -1)
        grouped = scores.view(part[0].stop - part[0].start, -1, *scores.shape[1:])
        grouped += added
        weights = torch.softmax(scores, -1)
        nowhere = added.amax(-1, keepdim=True) == -math.inf
        if bool(nowhere.any()):
            weights.view_as(grouped).masked_fill_(nowhere, 0)
        return weights

    def _mask_term(self, part: tuple[slice, slice], like: Tensor) -> Tensor:
        """What is added to the scores: 0 or -inf, or the mask's own floats."""
        assert self.mask is not None
        mask = self.mask[part[0] if self.mask.shape[0] > 1 else slice(None)]
        mask = mask[:, part[1]] if mask.shape[1] > 1 else mask
        return _additive_mask(mask, like).to(like.dtype)  # type: ignore[union-attr]


class _Attention(torch.autograd.Function):
    """Saves query, key, value (before the repetition for grouped heads), the mask as it came, and a seed."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, is_causal: bool,
        scale: float,
    ) -> Tensor:  # fmt: skip
        ctx.settings, ctx.seed = (p, is_causal, scale), new_seed() if p else 0
        ctx.save_for_backward(query, key, value, mask)
        groups = query.shape[1] // key.shape[1]
        if not p:
            return functional.scaled_dot_product_attention(
                query, _repeat_heads(key, groups), _repeat_heads(value, groups), mask, 0.0, is_causal, scale=scale
            )
        batch, heads, queries, _ = query.shape
        # laid out as the model will want it: heads side by side for each token
        out = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
        generator = make_generator(ctx.seed, query.device)
        with no_autocast(query.device):
            scores = _Scores(query, key, mask, is_causal, scale)
            for part, few in scores.pieces():
                weights = scores.probabilities(
                    wide_enough(query[part]).flatten(0, 1), scores.expand_heads(key, few), part
                )
                weights.mul_(dropout_noise(weights.numel(), p, weights.dtype, generator).view_as(weights))
                out[part] = torch.bmm(weights, scores.expand_heads(value, few)).view_as(out[part])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        settings = (*ctx.settings, ctx.seed)
        _, grads = attention_gradients(ctx.saved_tensors, settings, gradient, wants_output=False)
        return *grads, None, None, None, None


def attention_gradients(
    tensors: Sequence[Any], settings: tuple[float, bool, float, int], gradient: Tensor, wants_output: bool = True
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output of an attention, and the gradients of query, key and value from that of the output.

    `tensors`: query, key, value and the mask or None; `settings`: dropout, whether causal, scale and seed. The
    gradient of the output may have its heads side by side, `(batch * tokens, heads * width)`; the output has.
    """
    (query, key, value, mask), (p, is_causal, scale, seed) = tensors, settings
    generator = make_generator(seed, query.device)
    batch, heads, queries, _ = query.shape
    if gradient.dim() == 2:
        gradient = gradient.view(batch, queries, heads, -1).transpose(1, 2)
    rows = query.new_empty(batch, queries, heads * value.shape[-1] if wants_output else 0)
    out = rows.view(batch, queries, heads, -1).transpose(1, 2) if wants_output else None
    for_query, for_key, for_value = (torch.empty_like(t) for t in (query, key, value))
    with no_autocast(query.device):
        scores = _Scores(query, key, mask, is_causal, scale)
        for part, few in scores.pieces():
            q, g = (wide_enough(t[part]).flatten(0, 1) for t in (query, gradient))
            k, v = scores.expand_heads(key, few), scores.expand_heads(value, few)
            weights = scores.probabilities(q, k, part)
            noise = dropout_noise(weights.numel(), p, weights.dtype, generator).view_as(weights) if p else None
            dropped = weights if noise is None else weights * noise
            if out is not None:
                out[part] = torch.bmm(dropped, v).view_as(out[part])
            for_value[few] = _sum_groups(torch.bmm(dropped.transpose(1, 2), g), query[part].shape, scores.groups)
            back = torch.bmm(g, v.transpose(1, 2))
            back = aten._softmax_backward_data(back if noise is None else back.mul_(noise), weights, -1, weights.dtype)
            for_query[part] = torch.bmm(back, k).mul_(scale).view_as(query[part])
            for_key[few] = _sum_groups(torch.bmm(back.transpose(1, 2), q).mul_(scale), query[part].shape, scores.groups)
    return rows, (for_query, for_key, for_value)


class _Flash(torch.autograd.Function):
    """PyTorch's CPU flash kernel with the mask and the grouped heads as they came."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
    ) -> Tensor:
        ctx.settings = (is_causal, scale)
        groups = query.shape[1] // key.shape[1]
        out, sums = aten._scaled_dot_product_flash_attention_for_cpu(
            query, _repeat_heads(key, groups), _repeat_heads(value, groups), 0.0, is_causal,
            attn_mask=_additive_mask(mask, query), scale=scale,
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, mask, out, sums)
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, mask, out, sums = ctx.saved_tensors
        is_causal, scale = ctx.settings
        groups = query.shape[1] // key.shape[1]
        for_query, for_key, for_value = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, query, _repeat_heads(key, groups), _repeat_heads(value, groups), out, sums, 0.0, is_causal,
            attn_mask=_additive_mask(mask, query), scale=scale,
        )  # fmt: skip
        return (
            for_query,
            _sum_groups(for_key, query.shape, groups),
            _sum_groups(for_value, query.shape, groups),
            None,
            None,
            None,
        )


def _additive_mask(mask: Tensor | None, like: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return like.new_zeros(mask.shape).masked_fill_(mask.logical_not(), -math.inf)


def _repeat_heads(x: Tensor, groups: int) -> Tensor:
    """Each head `groups` times."""
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def _sum_groups(x: Tensor, shape: torch.Size, groups: int) -> Tensor:
    """Gradients for each of the query's heads, `(rows, heads, ...)` of `shape`, added up for each of the key's."""
    x = x.view(shape[0], shape[1], *x.shape[-2:])
    return x if groups == 1 else x.view(shape[0], -1, groups, *x.shape[2:]).sum(2)


class Repeats:
    """Remembers which tensors are a grouped key or value repeated for every head, and of what.

    Models that repeat before attention (as Hugging Face's do where there is a mask) would save every copy.
    """

    def __init__(self) -> None:
        self.expanded: tuple[weakref.ref[Tensor], Tensor] | None = None
        self.pairs: list[tuple[weakref.ref[Tensor], Tensor, int, tuple[int, int]]] = []  # of a key and a value

    def expand(self, x: Tensor, *sizes: Any) -> Tensor:
        """`Tensor.expand`, noting `(batch, heads, 1, tokens, width)` made larger in the third place."""
        y = x.expand(*sizes)
        if y.dim() == 5 and x.dim() == 5 and x.shape[2] == 1 < y.shape[2] and x.requires_grad:
            self.expanded = (weakref.ref(y), x)
        return y

    def reshape(self, x: Tensor, *sizes: Any) -> Tensor:
        """`Tensor.reshape`, noting what of an expanded tensor becomes `(batch, heads, tokens, width)`."""
        y = x.reshape(*sizes)
        if self.expanded is not None and self.expanded[0]() is x:
            few, groups = self.expanded[1], x.shape[2]
            if y.shape == (x.shape[0], x.shape[1] * groups, *x.shape[3:]):
                self.pairs = [*self.pairs[-1:], (weakref.ref(y), few.squeeze(2), groups, (y._version, few._version))]
            self.expanded = None
        return y

    def before_repeat(self, x: Tensor) -> tuple[Tensor, int]:
        """`x` before it was repeated, and how often it was."""
        for output, few, groups, versions in self.pairs:
            if output() is x and (x._version, few._version) == versions:
                return few, groups
        return x, 1


def scaled_dot_product_attention(
    last: LastActivation, repeats: Repeats, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`functional.scaled_dot_product_attention`; its dropout draws one seed from the global generator."""
    tensors = (query, key, value)
    if not _fits(tensors, attn_mask, is_causal, dropout_p, enable_gqa):
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    (few_key, groups), (few_value, others) = repeats.before_repeat(key), repeats.before_repeat(value)
    if groups == others:
        key, value = few_key, few_value
    repeats.pairs = []
    dtype = autocast_dtype(query)
    if dtype is not None:
        query, key, value = (t.to(dtype) for t in (query, key, value))
        attn_mask = attn_mask.to(dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    long = query.shape[2] * key.shape[2] > _SHORT and query.device.type == "cpu" and query.shape[-1] == value.shape[-1]
    if long and not dropout_p:
        flat = tuple(t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
        return _Flash.apply(*flat, attn_mask, is_causal, scale)  # type: ignore[no-any-return,no-untyped-call]
    y: Tensor = _Attention.apply(query, key, value, attn_mask, dropout_p, is_causal, scale)  # type: ignore[no-untyped-call]
    seed: int = y.grad_fn.seed  # type: ignore[union-attr]
    last.record_attention(y, (query, key, value), attn_mask, dropout_p, is_causal, scale, seed)
    return y


def _fits(
    tensors: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, is_causal: bool, p: float, enable_gqa: bool
) -> bool:
    """Whether this call is one of the common ones; the rest is PyTorch's."""
    query, key, value = tensors
    if not any(t.requires_grad for t in tensors) or not 0 <= p < 1 or (mask is not None and is_causal):
        return False
    if any(t.dim() != 4 or not t.numel() or t.dtype != query.dtype or t.device != query.device for t in tensors):
        return False
    if not query.is_floating_point() or (query.device.type != "cpu" and not p):  # elsewhere its kernels save no scores
        return False
    if not query.shape[0] == key.shape[0] == value.shape[0] or key.shape[:3] != value.shape[:3]:
        return False
    heads, groups = query.shape[1], key.shape[1]
    if heads != groups and not (enable_gqa and heads % groups == 0):
        return False
    if mask is None:
        return True
    fits = mask.dtype in (torch.bool, query.dtype) and not mask.requires_grad and mask.dim() in (2, 4)
    full = (query.shape[0], heads, query.shape[2], key.shape[2])
    return fits and torch.broadcast_shapes(mask.shape, full) == full  # type: ignore[no-untyped-call]
