"""Split linears: the inputs of the largest range are multiplied apart, so that 8 or 4 bits fit the others better.

Dettmers et al., LLM.int8(), 2022, arXiv:2208.07339, and Ashkboos et al., QUIK, 2023, arXiv:2310.09259. Both choose the
inputs by the largest absolute activation; the first at each call, the second beforehand, as here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs
from edgetune.core.layers import select
from edgetune.core.technique import Needs, Sample, Technique
from edgetune.core.traits import Trait
from edgetune.lean.reads import refuse_read_elsewhere
from edgetune.quant.calibration import measure_inputs
from edgetune.quant.split import SplitLinear, rebuild_split, split_outliers_off
from edgetune.quant.splittable import SHARED, is_whole, refuse_unsplittable, shared_weights, warn_of_whole

_LEAST = 2  # inputs that go apart: torchao rounds no tokens of a single value


class Outliers(Technique):
    """Before `int4` or `int8_dynamic`: multiply the inputs of the largest range apart, in floating point.

    In each linear a share of the inputs, those with the largest absolute values on calibration batches, goes through a
    small linear of its own (`NAME.outlier`), and the layer itself sees zeros there. That is exact. A later `int4` then
    rounds weights and activations without these inputs; the patterns of its layers stay as they are, and
    `int8_linears: ["*.outlier"]` stores the small ones in 8 bits. A layer that no batch reaches, whose weight is
    another's too, or that has two inputs or fewer stays whole, and a warning names it. Raises `EdgetuneError` for a
    layer whose weight is read elsewhere or not finite.
    """

    name: ClassVar[str] = "outliers"
    leaves: ClassVar[Trait] = Trait.SPLIT
    exact: ClassVar[bool] = True

    share: float = Field(default=0.01, gt=0, le=0.5)
    """Share of the inputs of a layer that are multiplied apart, at least two."""
    targets: tuple[str, ...] = ("*",)
    """Patterns of the linear layers to split."""
    skip: tuple[str, ...] = ()
    """Patterns of linear layers to leave whole."""
    calibration_batches: int = Field(default=8, ge=1)
    """Number of batches of training rows on which ranges are measured."""

    @property
    def needs(self) -> Needs:
        """Batches to measure ranges on."""
        return "batches"

    def for_rehearsal(self) -> Technique:
        """The same structure, from one batch."""
        return self.model_copy(update={"calibration_batches": 1})

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Split the layers in place."""
        sample = self.require_sample(sample)
        chosen: dict[str, Any] = dict(select(model, self.targets, self.skip, nn.Linear, is_whole))
        for name, layer in chosen.items():
            refuse_unsplittable(self.name, name, layer)
        shared = shared_weights(model, chosen)
        narrow = [name for name, layer in chosen.items() if not can_split(layer) and name not in shared]
        splittable = {name: layer for name, layer in chosen.items() if name not in (*shared, *narrow)}
        refuse_read_elsewhere(model, splittable, sample)
        batches = sample.first_batches(self.calibration_batches)
        split = split_outliers(model, splittable, self.share, batches) if splittable else []
        reasons = (
            ([name for name in splittable if name not in split], "no calibration batch reaches these layers"),
            (shared, SHARED),
            (narrow, f"these layers have {_LEAST} inputs or fewer"),
        )
        warn_of_whole(self.name, reasons)
        return model

    def rebuild(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """Split linears."""
        return rebuild_split(model, state)


def split_outliers(
    model: nn.Module, layers: Mapping[str, nn.Linear], share: float, batches: Sequence[Inputs]
) -> list[str]:
    """Split those of the linears that a batch reaches by the ranges of their inputs. Returns their names."""
    for name, layer in layers.items():
        if isinstance(layer, SplitLinear):
            raise EdgetuneError(f"{name} is split already", got=type(layer).__name__, action="split layers only once")
    sizes = measure_inputs(model, layers, batches)
    for name, size in sizes.items():
        count = max(_LEAST, round(share * layers[name].in_features))
        split_outliers_off(layers[name], size.largest.topk(count).indices.sort().values)
    return list(sizes)


def can_split(layer: nn.Linear) -> bool:
    """Whether it has more inputs than the least that go apart."""
    return layer.in_features > _LEAST
