"""SmoothQuant and AWQ's search: move scales from the inputs of linears into the layers that compute them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from edgetune.capture.recorded import record
from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.technique import Needs, Sample, Technique
from edgetune.core.traits import Trait
from edgetune.quant.calibration import InputSizes, measure_inputs
from edgetune.quant.channels import check_outputs, find_groups, refuse_infinite, refuse_unplain
from edgetune.quant.rounding import Grid
from edgetune.quant.scales import fold_scales, search_scales, smooth_scales


class Smooth(Technique):
    """Scale the channels that linears read, so that quantization loses less; the outputs of the model stay.

    The layer before divides each channel by a scale and the linears multiply it back: a norm before its linears, a
    value projection before attention's output, and an up projection or a ReLU layer before the next linear. Only
    channels that nothing else reads are scaled, as observed on the example inputs: not those of a norm that a residual
    also reads, as in BERT. Put it before a step of quantization.

    With a number, the scale is max|x|^alpha / max|w|^(1 - alpha) (SmoothQuant, arXiv:2211.10438, eq. 4). With `auto` it
    is rms(x)^alpha with the alpha, one for each group of linears, that leaves the least squared error of their outputs
    on calibration batches when weights and inputs are rounded (AWQ, arXiv:2306.00978, eq. 5). Raises `EdgetuneError`
    for a model without such channels.
    """

    name: ClassVar[str] = "smooth"
    exact: ClassVar[bool] = True
    takes: ClassVar[Trait] = Trait.PLAIN

    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = 0.5
    """How much of the differences between channels moves from activations into weights, 0 to 1; `auto`: searched."""
    bits: Literal[4, 8] = 4
    """Bits of the weights for which `auto` searches; if not set, those of the step of quantization that follows."""
    group_size: Annotated[int, Field(ge=1)] | Literal["channel"] = 32
    """Number of weights that share a scale, for `auto`; if not set, that of the step that follows."""
    calibration_batches: int = Field(default=8, ge=1)
    """Number of batches of training rows on which activations are measured."""

    @property
    def needs(self) -> Needs:
        """Batches, to measure activations on."""
        return "batches"

    def adapt_to(self, later: Sequence[Technique]) -> Technique:
        """With the grid of the first step of quantization that follows."""
        step = next((step for step in later if step.leaves & Trait.INTEGER), None)
        if step is None or self.model_fields_set & {"bits", "group_size"}:
            return self
        group_size = getattr(step, "group_size", None)  # only weights of 4 bits have groups
        grid = {"bits": 8, "group_size": "channel"} if group_size is None else {"bits": 4, "group_size": group_size}
        return self.model_copy(update=grid)

    def for_rehearsal(self) -> Technique:
        """The same groups, without the search."""
        return self.model_copy(update={"alpha": 0.5, "calibration_batches": 1})

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Scale in place. Raises `EdgetuneError`, and leaves the weights as they were, if that changes the outputs."""
        sample = self.require_sample(sample)
        refuse_unplain(model, self.name)
        groups = find_groups(model, record(model, sample.inputs))
        linears = {name: model.get_submodule(name) for group in groups for name in group.readers}
        if not groups:
            raise _nothing_to_scale_error(model)
        layers = [name for group in groups for name in group.layers]
        refuse_infinite(model, layers)
        batches = sample.first_batches(self.calibration_batches)
        sizes = measure_inputs(model, linears, batches)
        _refuse_unmeasured(linears, sizes)
        if self.alpha == "auto":
            grids = dict.fromkeys(linears, self._grid())
            scales = [search_scales(model, group, sizes, grids) for group in groups]
        else:
            scales = [smooth_scales(model, group, sizes, self.alpha) for group in groups]
        with check_outputs(model, sample.inputs, layers):
            for group, factors in zip(groups, scales, strict=True):
                fold_scales(model, group, factors)
        return model

    def _grid(self) -> Grid:
        scale_dtype = torch.bfloat16 if self.bits == 4 else None  # as XNNPACK stores scales
        return Grid(self.bits, None if self.group_size == "channel" else self.group_size, scale_dtype)


def _refuse_unmeasured(linears: Iterable[str], sizes: dict[str, InputSizes]) -> None:
    names = [name for name in linears if name not in sizes]
    if names:
        raise EdgetuneError(
            f"no token of the calibration batches reaches these layers: {truncate_list(names)}",
            action="give more calibration batches",
        )


def _nothing_to_scale_error(model: nn.Module) -> EdgetuneError:
    return EdgetuneError(
        f"{type(model).__name__} has no channels to scale: no linear alone reads what a norm, a value projection or "
        "another linear computes, as far as scales pass through what is in between",
        action="leave smooth out",
    )
