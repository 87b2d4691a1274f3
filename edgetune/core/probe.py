"""Random input that fits a layer, and the difference of two layers on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from edgetune.core.experts import is_fused, width_of
from edgetune.core.inputs import device_of
from edgetune.core.modes import preserve_state

EXACT = 1e-5  # largest difference over the largest value of the output, for changes that must change nothing
_ROWS = 3


def probe_inputs(layer: nn.Module) -> tuple[Tensor, ...] | None:
    """Inputs that fit a plain layer, always the same; `None` if its class does not determine them.

    The values are several times as large as usual activations, to expose layers whose effect depends on their input,
    such
    as routers.
    """
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.MultiheadAttention):
        query, key, value = (_normal(layer, 4, _ROWS, width) for width in (layer.embed_dim, layer.kdim, layer.vdim))
        return query, key, value
    if isinstance(layer, nn.Embedding):
        ids = torch.randint(layer.num_embeddings, (_ROWS, 5), generator=_generator())
        ids[0, 0] = layer.num_embeddings - 1 if layer.padding_idx is None else layer.padding_idx
        return (ids.to(device_of(layer)),)
    if isinstance(layer, _ConvNd):
        return (_normal(layer, 2, layer.in_channels, *map(max, _smallest_image(layer), _padded_image(layer))),)
    if isinstance(layer, (_BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        dims = next((n for n in (1, 2, 3) if type(layer).__name__.endswith(f"{n}d")), 2)
        return (_normal(layer, _ROWS, layer.num_features, *([4] * dims)),)
    if isinstance(layer, nn.GroupNorm):
        return (_normal(layer, _ROWS, layer.num_channels, 4, 4),)
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return (_normal(layer, _ROWS, *layer.normalized_shape),)
    if hasattr(layer, "in_features"):
        return (_normal(layer, _ROWS, 2, layer.in_features),)  # type: ignore[arg-type]
    if is_fused(layer):  # every token is sent to every expert
        number = len(layer.down_proj)  # type: ignore[arg-type]
        chosen = torch.arange(number, device=device_of(layer)).expand(_ROWS, number)
        return _normal(layer, _ROWS, width_of(layer)), chosen, _normal(layer, _ROWS, number)
    if isinstance(weight, Tensor) and 1 <= weight.dim() <= 2:  # transformers' Conv1D (in, out), custom norms
        return (_normal(layer, _ROWS, 2, weight.shape[0]),)
    return None


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)  # not torch's own state: a probe leaves no trace


def _normal(layer: nn.Module, *shape: int) -> Tensor:
    types = [p.dtype for p in layer.parameters() if p.is_floating_point()]
    dtype = getattr(layer, "plain_dtype", None) or next(iter(types), torch.float32)  # the first of a 4-bit linear
    return (4 * torch.randn(shape, generator=_generator())).to(device_of(layer), dtype)


def _smallest_image(layer: _ConvNd) -> list[int]:
    """For each axis, a size that gives several outputs."""
    axes = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
    return [dilation * (kernel - 1) + 1 + 2 * stride for kernel, dilation, stride in axes]


def _padded_image(layer: _ConvNd) -> list[int]:
    """For each axis, a size that allows reflection padding."""
    return [max(pair) + 1 for pair in zip(*[iter(layer._reversed_padding_repeated_twice)] * 2)][::-1]  # noqa: B905


@torch.no_grad()
def outputs_of(layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """The layer's output in eval mode, without its own hooks; the first of several."""
    with preserve_state(layer):
        output: Any = layer.forward(*inputs)
    return output if isinstance(output, Tensor) else output[0]


def relative_difference(expected: Tensor, actual: Tensor) -> float:
    """The largest difference over the largest value of `expected`.

    Infinite where the shapes differ or a value is not finite.

    >>> relative_difference(torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0]))
    0.25
    """
    if expected.shape != actual.shape:
        return float("inf")
    expected, actual = expected.double(), actual.double()
    difference = (expected - actual).abs().max() / expected.abs().max().clamp(min=1e-12)
    return float(difference) if bool(torch.isfinite(difference)) else float("inf")


def rounding_tolerance(dtype: torch.dtype) -> float:
    """The largest difference that rounding alone causes in this type, relative to the largest output value."""
    return {torch.float16: 5e-3, torch.bfloat16: 4e-2}.get(dtype, EXACT)
