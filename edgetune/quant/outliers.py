"""Split linears: the inputs of the largest range are multiplied apart, so that 8 or 4 bits fit the others better.

Dettmers et al., LLM.int8(), 2022, arXiv:2208.07339, and Ashkboos et al., QUIK, 2023, arXiv:2310.09259. Both choose the
inputs by the largest absolute activation; the first at each call, the second beforehand, as here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from edgetune.capture.fast_path import slow_path
from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.inputs import Inputs, call, device_of, tensors_in, to_device, token_mask
from edgetune.core.layers import parameter_owners, select
from edgetune.core.modes import preserve_buffers, preserve_state
from edgetune.core.plain import refuse_computed
from edgetune.core.technique import Needs, Sample, Technique
from edgetune.lean.reads import refuse_read_elsewhere
from edgetune.quant.size import weight_bits
from edgetune.quant.split import OutlierLinear, SplitLinear, rebuild_split, split_linear

_LEAST = 2  # inputs that go apart: torchao rounds no tokens of a single value


class Outliers(Technique):
    """Before `int4` or `int8_dynamic`: multiply the inputs of the largest range apart, in floating point.

    In each linear a share of the inputs, those with the largest absolute values on calibration batches, goes through a
    small linear of its own (`NAME.outlier`), and the layer itself sees zeros there. That is exact. A later `int4` then
    rounds weights and activations without these inputs; the patterns of its layers stay as they are, and
    `int8_linears: ["*.outlier"]` stores the small ones in 8 bits. A layer that no batch reaches, or whose weight is
    another's too, stays whole, and a warning names it. Raises `EdgetuneError` for a layer whose weight is read
    elsewhere, and for one with two inputs or fewer.
    """

    name: ClassVar[str] = "outliers"
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
        split_outliers(
            model, self.targets, self.skip, self.share, list(islice(sample.batches(), self.calibration_batches)), sample
        )
        return model

    def rebuild(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """Split linears."""
        return rebuild_split(model, state)


def split_outliers(
    model: nn.Module,
    targets: tuple[str, ...],
    skip: tuple[str, ...],
    share: float,
    batches: Iterable[Inputs],
    sample: Sample,
) -> list[str]:
    """Split the linears that patterns match by their ranges on these batches. Returns their names."""
    chosen = select(model, targets, skip, nn.Linear, lambda layer: not isinstance(layer, OutlierLinear))
    owners = parameter_owners(dict(model.named_modules()))
    shared = [name for name, layer in chosen.items() if len(owners.get(id(layer.weight), ())) > 1]
    chosen = {name: layer for name, layer in chosen.items() if name not in shared}
    for name, layer in chosen.items():
        _refuse_unfit(name, layer)
        refuse_computed(name, layer)
    refuse_read_elsewhere(model, chosen, sample)
    ranges = input_ranges(model, chosen, batches)
    idle = sorted(chosen.keys() - ranges.keys())
    for names, reason in ((idle, "no calibration batch reaches"), (shared, "other layers share the weights of")):
        if names:
            warnings.warn(
                f"outliers: {truncate_list(names)}: {reason} these layers, so they stay whole. To silence this: "
                f"skip: {names}",
                stacklevel=4,  # the caller of `et.apply`
            )
    for name, largest in ranges.items():
        layer = chosen[name]
        assert isinstance(layer, nn.Linear)
        count = max(_LEAST, round(share * layer.in_features))
        split_linear(layer, largest.topk(count).indices.sort().values)
    return list(ranges)


def input_ranges(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Inputs]) -> dict[str, Tensor]:
    """For each layer that a batch reaches the largest absolute value of each input, without padded tokens."""
    full = [batch for batch in batches if any(tensor.numel() for tensor in tensors_in(batch))]
    if not full:
        raise EdgetuneError(
            "there are no calibration batches, or they have no rows", action="pass et.Sample(inputs, batches) with rows"
        )
    ranges: dict[str, Tensor] = {}

    def measure(
        mask: Tensor | None, name: str, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> None:
        x = args[0] if args else kwargs["input"]
        if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
            x = x[mask]
        if not x.numel():
            return
        largest = x.reshape(-1, x.shape[-1]).abs().amax(0).float()
        ranges[name] = largest if name not in ranges else torch.maximum(ranges[name], largest)

    with preserve_state(model), preserve_buffers(model), slow_path(model), torch.no_grad():
        for batch in full:
            moved = to_device(batch, device_of(model))
            with ExitStack() as hooks:
                for name, layer in layers.items():
                    hook = partial(measure, token_mask(moved), name)
                    hooks.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
                call(model, moved)
    for name, largest in ranges.items():
        if not bool(torch.isfinite(largest).all()):
            raise EdgetuneError(
                "the inputs of a layer are not finite on the calibration batches",
                where=name,
                action="look for NaN or infinity in the sample and the weights",
            )
    return ranges


def _refuse_unfit(name: str, layer: nn.Module) -> None:
    assert isinstance(layer, nn.Linear)
    if isinstance(layer, SplitLinear) or weight_bits(layer.weight) is not None:
        reason = "is split already" if isinstance(layer, SplitLinear) else "is quantized already"
        raise EdgetuneError(f"{name} {reason}", got=type(layer).__name__, action="put outliers first, and only once")
    if layer.in_features <= _LEAST:
        raise EdgetuneError(
            f"{name} has too few inputs to split",
            got=layer.in_features,
            action=f'add "{name}" to skip',
        )
