"""Fused experts of a mixture, whose weights are parameters of three dims, as linears that can be quantized.

transformers keeps the experts of a layer in one `(experts, out, in)` parameter and multiplies by those that a token is
sent to. No backend has such a product in 8 or 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core.experts import expert_shares, is_fused, projections
from edgetune.core.layers import matches, replace


class SplitExperts(nn.Module):
    """A linear for each projection of each expert: `NUMBER.gate_up_proj` and `NUMBER.down_proj`.

    Every expert computes every token, and the router's weights, zero for most, sum them: operators of fixed shape and
    constant weights, which a backend takes. It costs the products of all experts in place of those chosen.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.number, self.names = len(fused.down_proj), projections(fused)
        for number in range(self.number):
            expert = nn.ModuleDict({name: _linear(fused, name, number) for name in self.names})
            self.add_module(str(number), expert)
        for name in [name for name, _ in fused.named_parameters(recurse=False)]:
            delattr(fused, name)
        self.gate = fused  # what is left of it: the activation, the norm and their settings
        self.train(fused.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`(tokens, width)`; the other two are `(tokens, chosen)`."""
        shares = expert_shares(top_k_index, top_k_weights, self.number).to(hidden_states.dtype)
        up, down = self.names
        activate = self.gate._apply_gate if self.gate.has_gate else self.gate.act_fn
        total = torch.zeros_like(hidden_states)
        for number in range(self.number):
            expert = self.get_submodule(str(number))
            output = expert[down](activate(expert[up](hidden_states)))  # type: ignore[index, operator]
            if self.gate.has_post_expert_norm:
                output = self.gate.post_expert_norm(output)  # type: ignore[operator]
            total = total + output * shares[:, number : number + 1]
        return total


def split_experts(model: nn.Module, wanted: Callable[[str], bool]) -> None:
    """Split each fused module with an expert's linear that is wanted by its later name, in place and exactly."""
    for name, module in list(model.named_modules()):
        if is_fused(module) and any(map(wanted, linear_names(name, module))):
            replace(model, name, SplitExperts(module))


def split_wanted_experts(model: nn.Module, patterns: tuple[str, ...], skip: tuple[str, ...]) -> tuple[str, ...]:
    """Split fused experts that are to be quantized. Returns `skip` without patterns for those that stay fused."""
    split_experts(model, lambda name: matches(name, patterns) and not matches(name, skip))
    fused = [n for name, module in model.named_modules() if is_fused(module) for n in linear_names(name, module)]
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    return tuple(p for p in skip if any(matches(n, [p]) for n in layers) or not any(matches(n, [p]) for n in fused))


def split_as_stored(model: nn.Module, names: Container[str]) -> nn.Module:
    """Split the fused experts of a model that are split in stored tensors of these names, and return it."""
    split_experts(model, lambda name: f"{name}.weight" in names)
    return model


def describe_split(model: nn.Module) -> str:
    """What splitting costs, for people; empty if nothing was split."""
    split = [module for module in model.modules() if isinstance(module, SplitExperts)]
    if not split:
        return ""
    return (
        f"the {split[0].number} experts of {len(split)} layers are linears now, "
        "and each of them computes every token, where only those chosen did"
    )


def linear_names(name: str, fused: Any) -> list[str]:
    """The names that the linears of a fused module get."""
    return [f"{name}.{number}.{own}" for number in range(len(fused.down_proj)) for own in projections(fused)]


def _linear(fused: Any, name: str, number: int) -> nn.Linear:
    weight = getattr(fused, name)[number].detach()
    weight = weight.T if fused.is_transposed else weight
    bias = getattr(fused, f"{name}_bias")[number].detach() if fused.has_bias else None
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))  # so that the fused one is freed
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone())
    return linear
