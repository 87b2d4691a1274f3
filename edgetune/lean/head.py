"""Cross entropy over a large vocabulary without keeping logits: what backward needs is worked out in forward.

A language model's logits are its largest tensor by far, and cross entropy keeps one more of the same size. When the
head is frozen, backward needs neither: the gradient of the hidden states is `(softmax - onehot) @ weight`, as small as
the hidden states, and costs the same a moment earlier. The idea of fusing head and loss is that of Liger Kernel
(Hsu et al., 2024, arXiv:2410.10989) and Cut Cross-Entropy (Wijmans et al., 2024, arXiv:2411.09009).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from edgetune.lean import onednn

_ATTRIBUTE = "edgetune_head"  # on the logits: what they were made from
_CHUNK_VALUES = 2**23  # logits worked on at once


class _Head(NamedTuple):
    hidden: Tensor
    weight: Tensor


class KeepNoLogits:
    """A forward hook on a frozen linear head: its logits remember what they were made from."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Look at what trains at every call, so that a head made trainable later is treated as such by itself."""
        weight = module._parameters.get("weight")
        trains = any(p.requires_grad for p in module.parameters())
        if weight is None or trains or not isinstance(output, Tensor) or not output.requires_grad:
            return
        setattr(output, _ATTRIBUTE, _Head(args[0], weight))


def put_on(model: nn.Module) -> None:
    """Put the hook on the head that the model names by `get_output_embeddings`, as language models do, if it does."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if type(head) is nn.Linear and not any(isinstance(h, KeepNoLogits) for h in head._forward_hooks.values()):
        head.register_forward_hook(KeepNoLogits())


def take_off(model: nn.Module) -> None:
    """Remove the hook."""
    for module in model.modules():
        for key in [k for k, hook in module._forward_hooks.items() if isinstance(hook, KeepNoLogits)]:
            del module._forward_hooks[key]


def cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Cross entropy of `(..., classes)` against `(...)`, equal to PyTorch's in value and gradient, a scalar.

    Logits of a head with `KeepNoLogits`, or a view of all of them, leave only the hidden states' gradient to be kept.
    """
    head = of(logits)
    if head is None or not logits.requires_grad:
        return functional.cross_entropy(
            logits.float().flatten(0, -2), labels.flatten().to(logits.device), ignore_index=ignore_index,
            reduction=reduction,
        )  # fmt: skip
    rows = labels.flatten().to(logits.device)
    counted = (rows != ignore_index).nonzero().flatten()
    divisor = len(counted) if reduction == "mean" else 1
    flat = logits.detach().flatten(0, -2)
    return _FromHidden.apply(head.hidden, flat, head.weight, rows, counted, divisor)  # type: ignore[no-untyped-call, no-any-return]


def of(logits: Tensor) -> _Head | None:
    """What these logits were made from, if a frozen head says so and they are all of them."""
    for tensor in (logits, logits._base):
        head: _Head | None = getattr(tensor, _ATTRIBUTE, None)
        if tensor is not None and head is not None and tensor.numel() == logits.numel():
            return head
    return None


class _FromHidden(torch.autograd.Function):
    """Keeps the gradient of `hidden`, worked out in forward, a few rows of logits at a time."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, logits: Tensor, weight: Tensor, labels: Tensor, counted: Tensor, divisor: int
    ) -> Tensor:
        gradient = torch.zeros(len(labels), weight.shape[1], dtype=hidden.dtype, device=hidden.device)
        total = torch.zeros((), device=logits.device)
        for rows in torch.split(counted, max(1, _CHUNK_VALUES // logits.shape[1])):  # type: ignore[no-untyped-call]
            chances = logits[rows].float().log_softmax(1)
            wanted = labels[rows].unsqueeze(1)
            total -= chances.gather(1, wanted).sum()
            chances.exp_().scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=chances.dtype))
            gradient[rows] = onednn.of_input(chances.to(weight.dtype), weight).to(hidden.dtype)
        ctx.save_for_backward(gradient.div_(max(divisor, 1)).view(hidden.shape))
        return total / divisor  # nan without any label, as PyTorch's

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * outer, None, None, None, None, None
