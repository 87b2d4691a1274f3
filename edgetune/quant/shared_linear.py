"""A linear whose weight is read from a pool of parameters that other layers read too."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from edgetune.core.wrapped import Wrapped


def shared_layers(model: nn.Module) -> dict[str, SharedLinear]:
    """The layers that read a pool."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, SharedLinear)}


class SharedLinear(Wrapped):
    """A linear whose weight is blocks of the pool `(cells, block_size)`, each times a factor.

    All layers have the pool as a parameter; the state dict holds it once, with the first one, which `owns` it. The base
    has no weight of its own.
    """

    places: Tensor  # the cell of each block
    factors: Tensor  # sign and scale of each block
    gradient_factors: Tensor  # the factors of its gradient

    def __init__(
        self, base: Any, pool: nn.Parameter, places: Tensor, factors: Tensor, gradient_factors: Tensor, owns: bool
    ) -> None:
        shape = tuple(base.weight.shape)
        base.register_parameter("weight", None)
        super().__init__(base)
        self.shape, self.owns, self.pool = shape, owns, pool
        for name, value in (("places", places), ("factors", factors), ("gradient_factors", gradient_factors)):
            self.register_buffer(name, value.clone())
        self.register_state_dict_post_hook(_drop_pool)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_keep_pool)  # type: ignore[no-untyped-call]
        self.train(base.training)

    @property
    def weights(self) -> int:
        """How many values the weight has."""
        return math.prod(self.shape)

    @property
    def weight(self) -> Tensor:
        """The weight `(out, in)`."""
        return self.read(self.pool)

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        return self.base.bias  # type: ignore[return-value]

    def plain_tensors(self) -> dict[str, Tensor]:
        """The weight, and the base's bias."""
        return {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}

    def read(self, pool: Tensor) -> Tensor:
        """The weight of this pool."""
        return (pool[self.places] * self.factors.to(pool.dtype)[:, None]).view(self.shape)

    def gather(self, gradient: Tensor) -> Tensor:
        """The gradient of the pool, scaled, from that of the weight."""
        blocks = gradient.reshape(len(self.places), -1) * self.gradient_factors.to(gradient.dtype)[:, None]
        return torch.zeros_like(self.pool).index_add_(0, self.places, blocks.to(self.pool.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """The product; in autocast's type where that is on."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.pool.dtype
        x = x if dtype == self.pool.dtype else x.to(dtype)
        return _Product.apply(x, self.pool, self.bias, self, dtype)  # type: ignore[no-any-return, no-untyped-call]

    def extra_repr(self) -> str:
        """The shape and the number of shared parameters."""
        return f"{self.shape}, {self.pool.numel()} shared"


class _Product(torch.autograd.Function):
    """The product with a weight that is read again for backward, not saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: Tensor, bias: Tensor | None, layer: Any, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, pool)
        ctx.layer, ctx.dtype = layer, dtype
        return functional.linear(x, layer.read(pool).to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, pool = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        inputs = gradient @ ctx.layer.read(pool).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        shared = ctx.layer.gather(rows.t() @ x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        bias = rows.sum(0).to(ctx.layer.bias.dtype) if ctx.needs_input_grad[2] else None
        return inputs, shared, bias, None, None


def _drop_pool(layer: Any, state: dict[str, Any], prefix: str, _: object) -> None:
    if not layer.owns:
        del state[f"{prefix}pool"]


def _keep_pool(layer: Any, state: dict[str, Any], prefix: str, *_: object) -> None:
    if not layer.owns:
        state[f"{prefix}pool"] = layer.pool.detach()
