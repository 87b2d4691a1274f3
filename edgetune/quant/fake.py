"""Fake quantization: layers that compute with rounded weights and activations, and train those in floating point.

Gradients pass straight through the rounding (Bengio et al., 2013, arXiv:1308.3432). The rounding is that of the
technique which quantizes later, to the bit, so the layer computes what the quantized one will.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call  # type: ignore[attr-defined]
from torch.nn import functional

from edgetune.core.carriers import is_wrapped, plain_layer, plain_tensors
from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import parameter_owners, replace
from edgetune.core.merging import merge
from edgetune.core.peft_layers import is_peft, is_tuner
from edgetune.core.plain import is_stock
from edgetune.core.quiet import silence_libraries
from edgetune.core.wrapped import Wrapped
from edgetune.lean.frozen import remove_hooks
from edgetune.lean.reads import FirstForward
from edgetune.quant.blocks import round_by_rows
from edgetune.quant.rounding import Grid, Rule, dequantize, scaled_codes

WeightRule = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rounding:
    """A grid, and the rule by which a weight gets its codes on it, unless it lies on the grid and `keeps` that."""

    grid: Grid
    rule: Rule
    keeps: bool = True

    @torch.no_grad()
    def __call__(self, weight: Tensor, scales: Tensor | None = None) -> Tensor:
        """The values that stand for a weight `(out, in)`, in its type; with `scales`, to nearest by these."""
        if scales is not None:
            rounded = scaled_codes(weight, self.grid, scales)
        else:
            rounded = round_by_rows(weight, self.grid, self.rule) if self.keeps else self.rule(weight, self.grid)
        return dequantize(rounded, self.grid, weight.dtype)

    def __str__(self) -> str:
        return f"{self.rule.__name__}, {self.grid}"


class _StraightThrough(torch.autograd.Function):
    """Other values, with the gradient of those they stand for."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, others: Tensor) -> Tensor:
        return others.view_as(others)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def pass_through(values: Tensor, others: Tensor) -> Tensor:
    """`others` in place of `values`, to which the gradient goes unchanged."""
    if not (values.requires_grad and torch.is_grad_enabled()):
        return others
    return _StraightThrough.apply(values, others)  # type: ignore[no-untyped-call, no-any-return]


class _RoundedProduct(torch.autograd.Function):
    """A linear with the rounded weight of a layer, which is rounded again for backward instead of saved."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dense: Tensor, bias: Tensor | None, layer: FakeQuantized, rule: WeightRule
    ) -> Tensor:
        ctx.layer, ctx.rule = layer, rule
        ctx.save_for_backward(x if dense.requires_grad else None)
        return functional.linear(x, rule(dense), bias)

    @staticmethod
    @once_differentiable  # type: ignore[no-untyped-call, untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (needs_x, needs_weight, needs_bias, *_) = ctx.saved_tensors, ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        of_x = gradient @ ctx.rule(dense_weight(ctx.layer.base)).to(gradient.dtype) if needs_x else None
        of_weight = rows.t() @ x.flatten(0, -2).to(gradient.dtype) if needs_weight else None
        return of_x, of_weight, rows.sum(0) if needs_bias else None, None, None


@cache
def _primitives() -> Any:
    with silence_libraries():
        from torchao.quantization import quant_primitives
    return quant_primitives


def round_activations(values: Tensor) -> Tensor:
    """What an 8-bit dynamic kernel reads: 8 bits, asymmetric, with a scale for each token; torchao's, to the bit."""
    torchao, block = _primitives(), [1] * (values.dim() - 1) + [values.shape[-1]]
    with torch.no_grad():
        scale, zero = torchao.choose_qparams_affine(
            values, torchao.MappingType.ASYMMETRIC, block, torch.int8, -128, 127, zero_point_dtype=torch.int8
        )
        codes = torchao.quantize_affine(values, block, scale, zero, torch.int8, -128, 127)
        rounded = torchao.dequantize_affine(codes, block, scale, zero, torch.int8, -128, 127, output_dtype=values.dtype)
    return pass_through(values, rounded)


class FakeQuantized(Wrapped):
    """A layer that computes with its dense weight rounded; an adapter inside is part of that weight.

    `scales` `(out, groups)`: those that the weight keeps; `None`: the rounding chooses them at each forward.
    """

    scales: Tensor | None

    def __init__(self, base: nn.Module, rounding: Rounding, scales: Tensor | None = None) -> None:
        super().__init__(base)
        self.rounding = rounding
        self.settled: tuple[int, int] | None = None  # the address and version of a frozen weight on its grid
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> Tensor:
        """The rounded weight; its gradient goes to what it is made of."""
        dense = dense_weight(self.base)
        return pass_through(dense, self.round(dense))

    def round(self, dense: Tensor) -> Tensor:
        """The values that stand for the dense weight. A frozen one on its grid is rounded once."""
        frozen = isinstance(dense, nn.Parameter) and not dense.requires_grad  # not one that an adapter computes anew
        version = (dense.data_ptr(), dense._version)
        if frozen and self.settled == version:
            return dense
        rounded = self.rounding(dense, self.scales)
        if frozen and torch.equal(rounded, dense):
            self.settled = version
            return dense
        return rounded

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return getattr(plain_layer(self.base), "bias", None)

    def plain_tensors(self) -> dict[str, Tensor]:
        """The rounded weight, and the bias."""
        return {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}

    def extra_repr(self) -> str:
        """The rule and the grid."""
        return str(self.rounding)


class FakeQuantizedLinear(FakeQuantized):
    """A linear, with activations in 8 bits."""

    rounds_activations = True

    def forward(self, x: Tensor) -> Tensor:
        """The product of the rounded weight and the rounded activations."""
        x = round_activations(x) if self.rounds_activations else x
        return _RoundedProduct.apply(x, dense_weight(self.base), self.bias, self, self.weight_rule())  # type: ignore[no-untyped-call, no-any-return]

    def weight_rule(self) -> WeightRule:
        """What gives the dense weight its values in this forward: rounding."""
        return self.round


class FakeQuantizedEmbedding(FakeQuantized):
    """An embedding table: the rows that it looks up are rounded."""

    def forward(self, ids: Tensor) -> Tensor:
        """The rounded rows."""
        table: Any = plain_layer(self.base)
        if not is_stock(table):  # one that scales its rows, say
            return functional_call(table, {"weight": self.weight}, (ids,))  # type: ignore[no-any-return]
        rows = functional.embedding(ids, dense_weight(self.base), table.padding_idx)
        return pass_through(rows, self.rounding(rows.flatten(0, -2)).view_as(rows))


def dense_weight(layer: Any) -> Tensor:
    """The weight that a layer computes with, with its graph: that of a LoRA of peft includes the adapter."""
    if is_tuner(layer):
        weight = dense_weight(layer.base_layer)
        for name in [] if layer.disable_adapters or layer.merged else layer.active_adapters:
            dense = weight + layer.get_delta_weight(name)
            if name in getattr(layer, "lora_magnitude_vector", {}):  # DoRA, which takes the norm as a constant
                magnitude = layer.lora_magnitude_vector[name].weight
                dense = dense * (magnitude / dense.norm(dim=1).detach()).unsqueeze(1)
            weight = dense.to(weight.dtype)
        return weight
    return plain_tensors(layer)["weight"]


def refuse_unroundable(name: str, layer: Any) -> None:
    """Raise for an adapter that is no fixed part of the weight, and so cannot be rounded with it."""
    if not is_peft(layer):
        return
    reason = ""
    if not (is_tuner(layer) and hasattr(layer, "lora_A")):
        reason = f"is a {type(layer).__name__} of peft, and only LoRA is rounded with its weight"
    elif any(getattr(drop, "p", 0.0) for drop in layer.lora_dropout.values()):
        reason = "has a LoRA with dropout on its inputs, which no rounded weight contains"
    elif any(layer.lora_bias.values()):
        reason = "has a LoRA with a bias of its own"
    if reason:
        raise EdgetuneError(f"{name} {reason}", got=name, action=f'set dropout: 0.0 in lora, or add "{name}" to skip')
    refuse_unroundable(name, layer.base_layer)


def outer_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of a model but those inside a wrapped layer, under its first name."""
    modules = {name: module for name, module in model.named_modules() if name}
    wrapped = [name + "." for name, module in modules.items() if is_wrapped(module)]
    return {name: module for name, module in modules.items() if not name.startswith(tuple(wrapped))}


def wrap_layers(
    model: nn.Module,
    roundings: Mapping[str, Rounding],
    scales: Mapping[str, Tensor] = MappingProxyType({}),
    linear: Callable[..., FakeQuantizedLinear] = FakeQuantizedLinear,
) -> None:
    """Put a layer that rounds in the place of each of these, under all its names; some keep their scales."""
    layers = dict(model.named_modules(remove_duplicate=False))
    for name, rounding in roundings.items():
        layer = layers[name]
        kind = FakeQuantizedEmbedding if isinstance(plain_layer(layer), nn.Embedding) else linear
        new = kind(layer, rounding, scales.get(name)).train(layer.training)
        for other in [n for n, module in layers.items() if module is layer]:
            replace(model, other, new)


def merge_rounded(model: nn.Module) -> nn.Module:
    """Plain layers with the rounded weights, in floating point. A table and a head that share a weight are untied."""
    layers = [module for module in model.modules() if isinstance(module, FakeQuantized)]
    if _untie(model, map(plain_layer, layers)) and getattr(
        getattr(model, "config", None), "tie_word_embeddings", False
    ):
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]  # so that nothing ties them again
    linears = [layer for layer in layers if isinstance(layer, FakeQuantizedLinear)]
    for layer in linears:
        layer.rounds_activations = False  # that is left to the kernel, and `merge` compares without it
    try:
        model = merge(model, lambda layer: isinstance(layer, FakeQuantized))
    finally:
        for layer in linears:
            layer.rounds_activations = True
    remove_hooks(model, FirstForward)
    return model


def _untie(model: nn.Module, layers: Iterable[nn.Module]) -> bool:
    """Give layers that share their weight with another one a weight of their own; whether there are any."""
    untied = False
    for layer in layers:
        weight = layer._parameters.get("weight")
        owners = parameter_owners(dict(model.named_modules())).get(id(weight), []) if weight is not None else []
        if weight is not None and len(owners) > 1:
            layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            untied = True
    return untied
