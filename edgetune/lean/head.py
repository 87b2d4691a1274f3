"""Cross entropy over a large vocabulary without saving logits.

A language model's logits are its largest tensor by far, and cross entropy saves one more of the same size. When the
head is frozen, backward needs neither: the gradient of the hidden states is `(softmax - onehot) @ weight`, as small as
the hidden states, and costs the same a moment earlier. A head that trains saves the hidden states anyway, from which
backward computes the logits again. The idea of fusing head and loss is that of Liger Kernel (Hsu et al., 2024,
arXiv:2410.10989) and Cut Cross-Entropy (Wijmans et al., 2024, arXiv:2411.09009).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from edgetune.lean import onednn
from edgetune.lean.packing import no_autocast

_ATTRIBUTE = "edgetune_head"  # on the logits: what they were computed from
_CHUNK_VALUES = 2**23  # logits worked on at once


class _Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    trains: bool
    version: int  # of the logits as the head gave them


class SaveNoLogits:
    """A forward hook on a linear head: its logits remember what they were computed from."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Check what trains at every call, as a head may become trainable later."""
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is None or not args or not isinstance(output, Tensor) or not output.requires_grad:
            return
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        # where the bias alone trains no hidden states are saved, and under autocast the logits are of another type
        if not trains or (weight.requires_grad and args[0].dtype == weight.dtype == output.dtype):
            setattr(output, _ATTRIBUTE, _Head(args[0], weight, bias, trains, output._version))


def put_on(model: nn.Module) -> None:
    """Put the hook on the head that the model names by `get_output_embeddings`, as language models do, if it does."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if type(head) is nn.Linear and not any(isinstance(h, SaveNoLogits) for h in head._forward_hooks.values()):
        head.register_forward_hook(SaveNoLogits())


def take_off(model: nn.Module) -> None:
    """Remove the hook."""
    for module in model.modules():
        for key in [k for k, hook in module._forward_hooks.items() if isinstance(hook, SaveNoLogits)]:
            del module._forward_hooks[key]


def cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Cross entropy of `(..., classes)` against `(...)`, equal to PyTorch's in value and gradient, a scalar.

    Logits of a head with `SaveNoLogits`, or a view of all of them, leave only the hidden states or their gradient to be
    saved.
    """
    head = head_of(logits)
    if head is None or not logits.requires_grad:
        return functional.cross_entropy(
            logits.float().flatten(0, -2), labels.flatten().to(logits.device), ignore_index=ignore_index,
            reduction=reduction,
        )  # fmt: skip
    rows = labels.flatten().to(logits.device)
    counted = (rows != ignore_index).nonzero().flatten()
    divisor = len(counted) if reduction == "mean" else 1
    if head.trains:
        hidden = head.hidden.detach()
        return _LogitsAgain.apply(logits.flatten(0, -2), hidden, head.weight, head.bias, rows, counted, divisor)  # type: ignore[no-untyped-call, no-any-return]
    flat = logits.detach().flatten(0, -2)
    return _FromHidden.apply(head.hidden, flat, head.weight, rows, counted, divisor)  # type: ignore[no-untyped-call, no-any-return]


def head_of(logits: Tensor) -> _Head | None:
    """What these logits were computed from, if they are all logits of a head with the hook, in order and unchanged."""
    for tensor in (logits, logits._base):
        head: _Head | None = getattr(tensor, _ATTRIBUTE, None)
        if tensor is None or head is None or tensor.numel() != logits.numel() or head.version != logits._version:
            continue
        if tensor.shape[-1] == logits.shape[-1] and tensor.is_contiguous() and logits.is_contiguous():
            return head
    return None


def _loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the losses, and its for_logits: softmax minus one-hot, in float32 at least."""
    for_logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    wanted = labels.unsqueeze(1)
    total = -for_logits.gather(1, wanted).sum()
    return total, for_logits.exp_().scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=for_logits.dtype))


def _pieces(counted: Tensor, classes: int) -> tuple[Tensor, ...]:
    """The rows that count, a few at a time."""
    return torch.split(counted, max(1, _CHUNK_VALUES // classes))  # type: ignore[no-any-return, no-untyped-call]


class _FromHidden(torch.autograd.Function):
    """Saves the gradient of `hidden`, worked out in forward, a few rows of logits at a time."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, logits: Tensor, weight: Tensor, labels: Tensor, counted: Tensor, divisor: int
    ) -> Tensor:
        gradient = torch.zeros(len(labels), weight.shape[1], dtype=hidden.dtype, device=hidden.device)
        total = torch.zeros((), device=logits.device)
        for rows in _pieces(counted, logits.shape[1]):
            loss, for_logits = _loss_and_gradient(logits[rows], labels[rows])
            total += loss
            gradient[rows] = onednn.input_gradient(for_logits.to(weight.dtype), weight).to(hidden.dtype)
        ctx.save_for_backward(gradient.div_(max(divisor, 1)).view(hidden.shape))
        return total / divisor  # nan without any label, as PyTorch's

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * outer, None, None, None, None, None


class _LogitsAgain(torch.autograd.Function):
    """Saves hidden states and weight, as the head does; backward computes the logits again, a few rows at a time."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, counted: Tensor,
        divisor: int,
    ) -> Tensor:  # fmt: skip
        ctx.divisor, ctx.shape = divisor, logits.shape
        ctx.save_for_backward(hidden, weight, bias, labels, counted)
        losses = [_loss_and_gradient(logits[rows], labels[rows])[0] for rows in _pieces(counted, logits.shape[1])]
        return (torch.stack(losses).sum() if losses else logits.new_zeros(())) / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, labels, counted = ctx.saved_tensors
        hidden = hidden.reshape(-1, hidden.shape[-1])
        gradient = hidden.new_zeros(ctx.shape)
        with no_autocast(hidden.device):
            for rows in _pieces(counted, ctx.shape[1]):
                _, for_logits = _loss_and_gradient(onednn.linear(hidden[rows], weight, bias), labels[rows])
                gradient[rows] = for_logits.mul_(outer / max(ctx.divisor, 1)).to(gradient.dtype)
        return gradient, None, None, None, None, None, None
