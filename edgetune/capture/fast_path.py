"""`nn.TransformerEncoder` in eval mode: the results of its fast path, in operators that can be captured.

Given a padding mask, the fast path runs on nested tensors and leaves zeros where the mask hides, but only where every
row's padding is at its end (pytorch/pytorch#86120). `torch.export` follows the slow path, which computes values there.
The program must match the model, so it runs the slow path and then writes those zeros.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def slow_path(model: nn.Module) -> Iterator[None]:
    """While the body runs, every encoder takes its slow path with the results of its fast path."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        for module in model.modules():
            if enabled and isinstance(module, nn.TransformerEncoder) and _nests(module):
                for handle in _hide(module):
                    stack.callback(handle.remove)
        stack.callback(torch.backends.mha.set_fastpath_enabled, enabled)
        torch.backends.mha.set_fastpath_enabled(False)
        yield


def _nests(encoder: nn.TransformerEncoder) -> bool:
    """Whether it uses nested tensors in eval mode, as far as that does not depend on its inputs."""
    if not getattr(encoder, "use_nested_tensor", False) or len(encoder.layers) == 0:
        return False
    first: Any = encoder.layers[0]
    attention = first.self_attn
    read = (attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias,
            first.norm1.weight, first.norm1.bias, first.norm2.weight, first.norm2.bias,
            first.linear1.weight, first.linear1.bias, first.linear2.weight, first.linear2.bias)  # fmt: skip
    return not torch.overrides.has_torch_function(read)


def _hide(encoder: nn.TransformerEncoder) -> list[Any]:
    """Hooks that write the zeros: before the encoder's norm, or at its end if it has none."""
    signature = inspect.signature(encoder.forward)
    zeros_at: list[Tensor | None] = [None]  # (batch, length, 1), of the call that is running

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind(*args, **kwargs).arguments
        padding, source = given.get("src_key_padding_mask"), given["src"]
        zeros_at[0] = None
        if padding is not None and given.get("mask") is None and source.dim() == 3:
            zeros_at[0] = _zeros_at(padding, bool(getattr(encoder, "mask_check", True)))

    def zero(x: Tensor) -> Tensor:
        return x if zeros_at[0] is None else torch.where(zeros_at[0], torch.zeros_like(x), x)

    handles = [encoder.register_forward_pre_hook(enter, with_kwargs=True)]
    if encoder.norm is None:
        return [*handles, encoder.register_forward_hook(lambda module, args, output: zero(output))]
    return [*handles, encoder.norm.register_forward_pre_hook(lambda module, args: (zero(args[0]), *args[1:]))]


def _zeros_at(padding: Tensor, checked: bool) -> Tensor:
    """Where the fast path leaves zeros: the masked places, if they are at the ends or if it does not check that."""
    hidden = padding if padding.dtype == torch.bool else padding != 0
    if checked and hidden.shape[1] > 1:
        holes = hidden[:, :-1] & ~hidden[:, 1:]  # a visible place after a hidden one
        hidden = hidden & ~holes.any()
    return hidden.unsqueeze(-1)
