"""Fused experts of a mixture: modules of transformers whose weights are parameters `(experts, out, in)`, not linears.

A pattern of layers may name these parameters like layers, `*.experts.down_proj`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.layers import matches, select

_BEFORE_FUSION = ("gate_proj", "up_proj")  # both are rows of `gate_up_proj`


def is_fused(module: nn.Module) -> bool:
    """Whether it holds the experts of a mixture as transformers does, on one device."""
    weight = module._parameters.get("down_proj")
    return weight is not None and weight.dim() == 3 and hasattr(module, "_apply_gate") and hasattr(module, "has_gate")


def projections(fused: Any) -> tuple[str, str]:
    """The names of the first and the second product of each expert."""
    return ("gate_up_proj" if fused.has_gate else "up_proj", "down_proj")


def width_of(fused: Any) -> int:
    """The width of the tokens that the experts take and return."""
    return int(fused.down_proj.shape[-1 if fused.is_transposed else -2])


def expert_shares(top_k_index: Tensor, top_k_weights: Tensor, number: int) -> Tensor:
    """The share `(tokens, number)` of each expert in each token, zero for most, from those chosen `(tokens, top)`."""
    chosen = top_k_index[..., None] == torch.arange(number, device=top_k_index.device)
    return (chosen * top_k_weights[..., None]).sum(1)


def fused_weights(model: nn.Module) -> dict[str, nn.Module]:
    """For the name of each fused weight, `mlp.experts.down_proj`, the module that holds it."""
    modules = [(name, module) for name, module in model.named_modules() if is_fused(module)]
    return {f"{name}.{own}": module for name, module in modules for own in projections(module)}


def select_adapted(
    model: nn.Module,
    targets: Iterable[str],
    skip: Iterable[str],
    technique: str,
    kind: type[nn.Module] = nn.Module,
    accept: Callable[[nn.Module], bool] | None = None,
    instead: str | None = "use lora",
) -> dict[str, nn.Module]:
    """`select` for a technique that adapts layers, so that no pattern silently misses the experts of a mixture.

    With `instead` as `None` fused weights are among what is selected, each under its name with the module that holds
    it. Otherwise the technique does not reach them: raises if a pattern does, and recommends `instead`, or skipping.
    """
    fused = fused_weights(model)
    chosen = select(model, targets, skip, kind, accept, others=fused)
    _refuse_names_before_fusion(fused, list(targets), list(skip))
    missed = [name for name in chosen if name in fused]
    if missed and instead is not None:
        size = sum(model.get_parameter(name).numel() for name in missed)
        raise EdgetuneError(
            f"{technique} cannot adapt the experts of a mixture, {len(missed)} fused weights with {size:,} parameters",
            got=truncate_list(missed, 4),
            action=f'{instead}, or add "*.experts.*" to skip to leave the experts as they are',
        )
    return chosen


def _refuse_names_before_fusion(fused: Iterable[str], targets: list[str], skip: list[str]) -> None:
    """Raise for patterns that name a part of a fused weight, and would reach other layers only."""
    for name in fused:
        experts, _, own = name.rpartition(".")
        parts = [f"{experts}.{part}" for part in _BEFORE_FUSION if own == "gate_up_proj"]
        missed = [part for part in parts if matches(part, targets) and not matches(part, skip)]
        if missed and not matches(name, [*targets, *skip]):
            raise EdgetuneError(
                f"targets: {missed[0]} is a part of {name}, which no pattern names",
                got=targets,
                action=f'add "*.{own}" to targets or to skip',
            )
