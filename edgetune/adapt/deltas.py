"""What a saved adapter of any family adds to its base: the tensors of merged layers, less those of the plain ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from edgetune.adapt.loading import load_adapter
from edgetune.core.carriers import plain_tensors
from edgetune.core.packed_layers import is_nf4
from edgetune.core.peft_layers import is_tuner


@dataclass(frozen=True)
class Deltas:
    """What an adapter adds, in fp32: to tensors of the base by their names, and to biases that the base has not."""

    layers: tuple[str, ...]  # that are adapted; the others were trained whole
    tensors: Mapping[str, Tensor]


@torch.no_grad()
def read_deltas(folder: str | Path, model: nn.Module) -> Deltas:
    """What the adapter in `folder` adds to the plain base `model`, which stays as it is.

    Raises `EdgetuneError` for an adapter that does not fit, and for one that no plain layer can represent.
    """
    base = _in_float32(model)
    adapted = load_adapter(copy.deepcopy(base), folder)
    layers = [name for name, module in adapted.named_modules() if is_tuner(module)]
    deltas: dict[str, Tensor] = {}
    for name in layers:
        before = plain_tensors(base.get_submodule(name))
        for key, tensor in plain_tensors(adapted.get_submodule(name)).items():
            deltas[f"{name}.{key}"] = tensor - before[key] if key in before else tensor
    inside, after = tuple(f"{name}." for name in layers), adapted.state_dict()
    deltas |= {
        key: after[key] - value
        for key, value in base.state_dict().items()
        if value.is_floating_point() and not key.startswith(inside)
    }
    return Deltas(tuple(layers), {key: delta for key, delta in deltas.items() if bool(delta.any())})


def _in_float32(model: nn.Module) -> nn.Module:
    """The base, or a copy that computes in fp32: in 16 bits a merged weight would round away much of the difference."""
    if all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point()) and not any(
        is_nf4(module) for module in model.modules()
    ):
        return model
    base = copy.deepcopy(model).float()
    for module in base.modules():
        if is_nf4(module):
            module.plain_dtype = torch.float32  # type: ignore[assignment]
    return base
