"""PERFT: low-rank adapters beside the experts of a mixture, routed as experts are.

Liu et al., 2024, arXiv:2411.08212: `MoE(h) + sum_j weight_j up_j(act(down_j(h)))`. The weights come from a router of
the adapters' own (PERFT-R) or from the mixture's (PERFT-E), or all adapters count in full (PERFT-D, of one PERFT-S).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from edgetune.adapt.frozen_base import freeze_base, restore_base
from edgetune.core.carriers import float_type_of
from edgetune.core.errors import EdgetuneError
from edgetune.core.experts import expert_shares, is_fused, width_of
from edgetune.core.inputs import device_of
from edgetune.core.layers import matches, replace, select
from edgetune.core.technique import Sample, Technique
from edgetune.core.traits import Trait
from edgetune.core.wrapped import keep_base_keys

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "none": nn.Identity, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU
}  # fmt: skip


class AdaptedExperts(nn.Module):
    """Fused experts `base`, and `number` adapters whose weighted sum is added to what they return.

    All adapters are two linears: the rows of `down` and the columns of `up` are theirs, `rank` for each. A `router`
    picks `top` of them for each token; without one, `embedded` takes the picks of the mixture.
    """

    def __init__(self, base: Any, technique: PERFT, number: int, scale: float) -> None:
        super().__init__()
        width = width_of(base)
        self.base, self.number, self.top, self.scale = base, number, technique.top, scale
        self.down = nn.Linear(width, number * technique.rank, bias=False)
        self.up = nn.Linear(number * technique.rank, width, bias=False)
        self.activation, self.embedded = _ACTIVATIONS[technique.activation](), technique.form == "embedded"
        nn.init.zeros_(self.up.weight)
        self.router = nn.Linear(width, number, bias=False) if technique.form == "routed" else None
        self.imbalance: Tensor | None = None  # of the last training forward
        self.to(device_of(base)).train(base.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`(tokens, width)`; the other two are `(tokens, chosen)`."""
        output: Tensor = self.base(hidden_states, top_k_index, top_k_weights)
        x = hidden_states.to(self.up.weight.dtype)
        hidden = self.activation(self.down(x))
        if self.router is not None:
            probabilities = self.router(x).softmax(-1)
            top_k_weights, top_k_index = probabilities.topk(self.top, -1)
            if self.training and torch.is_grad_enabled():
                self.imbalance = imbalance(probabilities, top_k_index)
        if self.router is not None or self.embedded:
            weights = expert_shares(top_k_index, top_k_weights.to(x.dtype), self.number)
            hidden = (hidden.unflatten(-1, (self.number, -1)) * weights.unsqueeze(-1)).flatten(-2)
        added: Tensor = self.up(hidden).to(output.dtype)
        return output + (added if self.scale == 1 else self.scale * added)

    def __getstate__(self) -> dict[str, Any]:
        """Without the imbalance, whose graph cannot be copied."""
        return {**self.__dict__, "imbalance": None}


def imbalance(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """How unevenly `chosen` `(tokens, top)` are picked by `probabilities` `(tokens, number)`; 1 if evenly.

    `number * sum_j share_j * mean probability_j` (Fedus et al., 2021, arXiv:2101.03961, equation 4).
    """
    number, top = probabilities.shape[-1], chosen.shape[-1]
    shares = expert_shares(chosen, torch.ones_like(chosen, dtype=probabilities.dtype), number).mean(0) / top
    return number * (shares * probabilities.mean(0)).sum()


class PERFT(Technique):
    """Train routed low-rank adapters beside the experts of a mixture of transformers; the rest stays frozen.

    `up` is zero at the start, so nothing changes. The adapters cannot be merged: they remain as two or three linears
    beside the experts, which are then called `NAME.base`, and are exported with the model. With `routed`, training adds
    a balance loss, which `et.penalty` gives to loops of your own.
    """

    name: ClassVar[str] = "perft"
    takes: ClassVar[Trait] = Trait.FROZEN | Trait.PACKED | Trait.LEAN
    leaves: ClassVar[Trait] = Trait.ADAPTED
    exact: ClassVar[bool] = True

    form: Literal["routed", "embedded", "dense", "shared"] = "routed"
    """Which adapters a token gets: those that a router of their own picks (PERFT-R), those of the experts that the
    mixture picks, one for each expert (PERFT-E), all of them (PERFT-D), or the only one (PERFT-S)."""
    targets: tuple[str, ...] = ("*",)
    """Patterns of the modules of experts, such as `*.experts`; by default all."""
    skip: tuple[str, ...] = ()
    """Patterns of modules to exclude from `targets`."""
    rank: int = Field(8, ge=1)
    """Rank of each adapter."""
    adapters: int = Field(4, ge=1)
    """Number of adapters in each layer, for `routed` and `dense`."""
    top: int = Field(2, ge=1)
    """How many of the adapters each token gets, for `routed`."""
    activation: Literal["none", "relu", "gelu", "silu"] = "none"
    """The function between `down` and `up`."""
    scale: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Factor of the adapters' output."""
    balance: float = Field(0.01, ge=0, allow_inf_nan=False)
    """Weight of the loss that makes the router choose all adapters equally often, for `routed`."""

    @model_validator(mode="after")
    def _can_choose(self) -> PERFT:
        if self.form == "routed" and self.top > self.adapters:
            raise ValueError(f"top: a token cannot get {self.top} of {self.adapters} adapters")
        return self

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Put the adapters in, in place."""
        if not any(is_fused(module) for module in model.modules()):
            raise EdgetuneError(
                "the model has no fused experts, as transformers' mixtures do", got=type(model).__name__,
                action="use bottleneck or lora",
            )  # fmt: skip
        chosen = select(model, self.targets, self.skip, accept=is_fused)
        for name in chosen:
            if isinstance(model.get_submodule(name.rpartition(".")[0]), AdaptedExperts):
                raise EdgetuneError(f"{name} has adapters of perft already", got=name, action=f'add "{name}" to skip')
        freeze_base(model, self.name)
        for name, module in chosen.items():
            layer = self._adapted(module, self.scale)
            keep_base_keys(layer)
            replace(model, name, layer)
        return model

    def penalty(self, model: nn.Module) -> Tensor | None:
        """`balance` times the imbalance of the last training forward, the mean over the layers."""
        layers = [module for module in model.modules() if isinstance(module, AdaptedExperts)]
        terms = [layer.imbalance for layer in layers if layer.imbalance is not None]
        for layer in layers:
            layer.imbalance = None
        return self.balance * torch.stack(terms).mean() if terms and self.balance else None

    def finalize(self, model: nn.Module) -> nn.Module:
        """Fold the scale into `up`, in the type of the model. Tensors have the names of their modules from now on."""
        for name, layer in list(model.named_modules()):
            if isinstance(layer, AdaptedExperts) and matches(name, self.targets):
                plain = self._adapted(layer.base, scale=1.0)
                plain.down, plain.up, plain.router = layer.down, layer.up, layer.router
                plain.up.weight.data.mul_(layer.scale)
                replace(model, name, plain.to(float_type_of(layer.base)))
        restore_base(model, self.name)
        return model

    def rebuild(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """The adapters, where `state` has them."""
        for name, module in list(model.named_modules()):
            if is_fused(module) and f"{name}.up.weight" in state:
                replace(model, name, self._adapted(module, scale=1.0))
        return model

    def _adapted(self, experts: Any, scale: float) -> AdaptedExperts:
        number = {"embedded": len(experts.down_proj), "shared": 1}.get(self.form, self.adapters)
        return AdaptedExperts(experts, self, number, scale)
