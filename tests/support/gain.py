"""A technique as someone would add it: this file, one line in the table, one case. No room of edgetune knows it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edgetune.core import trainable
from edgetune.core.carriers import plain_tensors
from edgetune.core.layers import replace, select
from edgetune.core.merging import merge
from edgetune.core.technique import Sample, Technique
from edgetune.core.traits import Trait
from edgetune.core.wrapped import Wrapped


class Gained(Wrapped):
    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self.gain = nn.Parameter(torch.ones(base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * self.gain

    def plain_tensors(self) -> dict[str, Tensor]:
        tensors = plain_tensors(self.base)
        bias = {"bias": tensors["bias"] * self.gain} if "bias" in tensors else {}
        return {"weight": tensors["weight"] * self.gain[:, None], **bias}


class Gain(Technique):
    """Train one factor for each output of a linear layer, as IA3 does (Liu et al., 2022, arXiv:2205.05638)."""

    name: ClassVar[str] = "gain"
    takes: ClassVar[Trait] = Trait.FROZEN | Trait.PACKED | Trait.LEAN
    leaves: ClassVar[Trait] = Trait.ADAPTED
    exact: ClassVar[bool] = True

    targets: tuple[str, ...]

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        layers = select(model, self.targets, accept=lambda layer: isinstance(layer, nn.Linear))
        trainable.remember(model, self.name)
        if not trainable.is_chosen(model):
            model.requires_grad_(False)
        for name, layer in layers.items():
            replace(model, name, Gained(layer))
        return model

    def finalize(self, model: nn.Module) -> nn.Module:
        model = merge(model, lambda layer: isinstance(layer, Gained))
        trainable.recall(model, self.name)
        return model
