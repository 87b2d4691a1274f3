"""LoRAs whose start is taken out of the base weight (PiSSA, OLoRA), saved as plain LoRAs on the weight as it was.

`W + change = (W - s B0 A0) + s B A`, so the change is a LoRA of twice the rank: `s [B, -B0] [A; A0]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgetune.adapt.inject import ADAPTER

INITIAL = "edgetune_initial_factors"  # the attribute of a model with A0 and B0, by layer


def remember_factors(model: nn.Module, names: list[str]) -> None:
    """Keep the factors of the fresh adapters, for `to_plain_lora`."""
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    model.__dict__[INITIAL] = {
        name: tuple(factor[ADAPTER].weight.detach().clone() for factor in (layer.lora_A, layer.lora_B))
        for name, layer in layers.items()
    }


def to_plain_lora(model: nn.Module, state: dict[str, Tensor], config: Any, prefix: str) -> dict[str, Tensor]:
    """The tensors of the file, and `config` changed in place, as a plain LoRA on the weights before the adapter."""
    initial: dict[str, tuple[Tensor, Tensor]] = model.__dict__.get(INITIAL, {})
    if not initial:
        return state
    config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True
    state = dict(state)
    for name, (down, up) in initial.items():
        key_down, key_up = (f"{prefix}{name}.lora_{factor}.weight" for factor in "AB")
        state[key_down] = torch.cat([state[key_down], down.to(state[key_down])])
        state[key_up] = torch.cat([state[key_up], -up.to(state[key_up])], dim=1)
    return state
