"""Weights on a few shared values, found by k-means, which Core ML stores as short codes and a table."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.layers import refuse_shared, select
from edgetune.core.registry import require
from edgetune.core.technique import Sample, Technique
from edgetune.core.traits import Trait
from edgetune.quant.channels import refuse_infinite, refuse_unplain

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
SMALLEST = 2048  # weights of a layer below which Core ML keeps them as they are
_PALETTE = "edgetune_palette_bits"  # the attribute of a layer whose weights were put on few values
_MOST_VALUES = 256
_PROBED = 4096  # weights that tell an ordinary weight from one on few values


class Palettize(Technique):
    """Move the weights of each linear and convolution to 2^bits values of its own, by k-means, for Core ML.

    Deep Compression (Han et al., 2016, arXiv:1510.00149, section 3), with its linear initialization, on weights as
    Core ML stores them, in fp16. The layers stay plain layers in floating point. An export for the target `coreml`
    stores each such weight as codes of `bits` bits and a table, and computes in fp16; on this machine such programs
    are lowered, not run. Programs for other targets store palettized weights in full: the export warns and names them.

    Layers of fewer than 2,048 weights stay as they are, since Core ML stores these in full. The others can no longer be
    trained, which would move weights off their values. One table serves a whole layer: those for groups of channels
    need iOS 18.
    """

    name: ClassVar[str] = "palettize"
    takes: ClassVar[Trait] = Trait.PLAIN
    leaves: ClassVar[Trait] = Trait.INTEGER

    bits: Literal[1, 2, 3, 4, 6, 8] = 4
    """Bits of a code: a layer keeps 2^bits different weights."""
    targets: tuple[str, ...] = ("*",)
    """Patterns of the linears and convolutions to palettize."""
    skip: tuple[str, ...] = ()
    """Patterns of layers to keep as they are."""

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Round the weights in place."""
        require("sklearn", self.name)
        refuse_unplain(model, self.name)
        layers = select(model, self.targets, self.skip, LAYERS)
        large = {name: layer for name, layer in layers.items() if layer.weight.numel() >= SMALLEST}  # type: ignore[union-attr, operator]
        if not large:
            raise EdgetuneError(
                f"palettize finds no layer of {SMALLEST:,} weights or more", got=truncate_list(list(layers)),
                action="leave palettize out",
            )  # fmt: skip
        refuse_shared(model, large)
        refuse_infinite(model, large)
        for name, layer in large.items():
            if "weight" not in layer._parameters:
                raise EdgetuneError(
                    f"{name} computes its weight", action="remove the parametrization, or add it to skip"
                )
        for layer in large.values():
            weight: Tensor = layer.weight  # type: ignore[assignment]
            with torch.no_grad():
                weight.copy_(cluster(weight, 2**self.bits))
            weight.requires_grad_(False)
            setattr(layer, _PALETTE, self.bits)
        return model

    def note(self, model: nn.Module) -> str:
        """How many layers have few values."""
        return f"{len(palettized_layers(model))} layers on at most {2**self.bits} values each"


def cluster(weight: Tensor, values: int) -> Tensor:
    """The weight with each element at the nearest of so many values, in fp16; these are the means of their elements."""
    from sklearn.cluster import KMeans

    points, index, counts = torch.unique(weight.detach().cpu().half(), return_inverse=True, return_counts=True)
    if len(points) <= values:
        same: Tensor = points[index].to(weight)
        return same
    start = torch.linspace(float(points[0]), float(points[-1]), values).unsqueeze(1)
    means = KMeans(values, init=start.double().numpy(), n_init=1, random_state=0)
    means.fit(points.double().unsqueeze(1).numpy(), sample_weight=counts.numpy())
    centres = torch.from_numpy(means.cluster_centers_).squeeze(1)
    codes = torch.from_numpy(means.labels_).long()
    rounded: Tensor = centres[codes].half()[index].to(weight)
    return rounded


def palettized_layers(model: nn.Module) -> list[str]:
    """The layers that `palettize` put on few values; others may have few as well, such as ternary ones."""
    return [name for name, layer in model.named_modules() if hasattr(layer, _PALETTE)]


def has_palette(weight: Tensor) -> bool:
    """Whether a weight in floating point has at most 256 values, and more than one."""
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point() or weight.numel() < SMALLEST:
        return False
    flat = weight.detach().flatten()
    return len(torch.unique(flat[:_PROBED])) <= _MOST_VALUES and 1 < len(torch.unique(flat)) <= _MOST_VALUES
