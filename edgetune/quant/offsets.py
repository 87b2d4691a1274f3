"""Offsets: what the weights of a group have in common is multiplied apart, so that 4 bits fit the rest better.

A runtime whose 4-bit weights are symmetric around zero, as XNNPACK's are, so gets those with a zero point for each
group: sum of (s q + m) x over a group is s times the sum of q x, plus m times the sum of x. The same identity carries
the zero points of Q4_1 in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import select
from edgetune.core.technique import Sample, Technique
from edgetune.core.traits import Trait
from edgetune.lean.reads import refuse_read_elsewhere
from edgetune.quant.split import SplitLinear, rebuild_split, split_offsets_off
from edgetune.quant.splittable import SHARED, is_whole, refuse_unsplittable, shared_weights, warn_of_whole

_STEPS = 15  # between the least and the greatest of 16 codes
_BELOW_ZERO = 8  # codes


class Offsets(Technique):
    """Before `int4`: give each group of weights an offset, as 4 bits with a zero point have it.

    The offset moves the range of a group to where 4 bits fit it, and `int4` rounds what is left. Offsets are multiplied
    by the means of the inputs of their groups, in a small linear of its own (`NAME.offset`), which gets 8 bits where
    the layer gets 4: a quarter of a bit for each weight in groups of 32. That is exact. Weights that came with zero
    points, such as those of a GGUF file in Q4_1 or Q4_K, are so stored almost as they were. It goes after `outliers`.

    A layer whose width the groups do not divide, or whose weight is another's too, stays whole, and a warning names it.
    Raises `EdgetuneError` for a layer that has offsets already, or whose weight is read elsewhere or not finite.
    """

    name: ClassVar[str] = "offsets"
    takes: ClassVar[Trait] = Trait.SPLIT
    leaves: ClassVar[Trait] = Trait.SPLIT
    exact: ClassVar[bool] = True

    group_size: int = Field(default=32, ge=2)
    """Number of weights that share an offset; if not set, that of the step of quantization that follows."""
    targets: tuple[str, ...] = ("*",)
    """Patterns of the linear layers that get offsets."""
    skip: tuple[str, ...] = ()
    """Patterns of linear layers without."""

    def adapt_to(self, later: Sequence[Technique]) -> Technique:
        """With the groups of the first step of quantization that follows."""
        step = next((step for step in later if step.leaves & Trait.INTEGER), None)
        size = getattr(step, "group_size", None)
        if "group_size" in self.model_fields_set or not isinstance(size, int):
            return self
        return self.model_copy(update={"group_size": size})

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Split the layers in place."""
        chosen: dict[str, Any] = dict(select(model, self.targets, self.skip, nn.Linear, is_whole))
        for name, layer in chosen.items():
            if isinstance(layer, SplitLinear) and layer.offset is not None:
                raise EdgetuneError(
                    f"{name} has offsets already", got=type(layer).__name__, action="give them only once"
                )
            refuse_unsplittable(self.name, name, layer)
        shared = shared_weights(model, chosen)
        unfit = [name for name, layer in chosen.items() if layer.weight.shape[1] % self.group_size]
        splittable = {name: layer for name, layer in chosen.items() if name not in (*shared, *unfit)}
        refuse_read_elsewhere(model, splittable, sample)
        for layer in splittable.values():
            split_offsets_off(layer, offsets_of(layer, self.group_size))
        unfit = [name for name in unfit if name not in shared]
        reason = f"groups of {self.group_size} do not divide their width"
        warn_of_whole(self.name, [(shared, SHARED), (unfit, reason)])
        return model

    def rebuild(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """Split linears."""
        return rebuild_split(model, state)


def offsets_of(layer: nn.Linear, group_size: int) -> Tensor:
    """`(out, groups)`: where the code of zero lies if 16 codes reach from the least to the greatest weight of a group.

    The columns of inputs that go through `outlier` do not count.
    """
    weight = layer.weight.detach()
    groups = weight.view(len(weight), -1, group_size)
    least, greatest = groups.amin(-1), groups.amax(-1)
    if isinstance(layer, SplitLinear) and layer.kept is not None:
        unseen = (layer.kept == 0).view(-1, group_size)
        least = groups.masked_fill(unseen, torch.inf).amin(-1)
        greatest = groups.masked_fill(unseen, -torch.inf).amax(-1)
    offsets: Tensor = least + (greatest - least) * (_BELOW_ZERO / _STEPS)
    return offsets.nan_to_num(0.0, 0.0, 0.0)  # of a group that is not seen at all
