"""Cross-layer equalization: move scales between convolutions, so that their weights have even ranges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgetune.capture.recorded import Recording, record
from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.inputs import Inputs, call, device_of, to_device
from edgetune.core.modes import preserve_buffers, preserve_state
from edgetune.core.technique import Needs, Sample, Technique
from edgetune.core.traits import Trait
from edgetune.quant.channels import (
    ChannelGroup,
    check_outputs,
    find_groups,
    normalized_layer,
    refuse_infinite,
    refuse_unplain,
    weight_of,
)
from edgetune.quant.scales import fold_scales, spread_inputs

_SWEEPS = 50
_SETTLED = 1e-3  # the change of a scale that ends the sweeps
_LEAST, _MOST = 1e-4, 1e4  # of a scale
_HEADROOM = 2.0  # between the largest value of the calibration batches and a ReLU6's 6


class Equalize(Technique):
    """Scale the channels between convolutions, so that each has the same range of weights on both sides; the outputs
    of the model stay.

    Cross-layer equalization (Nagel et al., 2019, arXiv:1906.04721, section 4.1), for `int8` with one scale for each
    weight (`per_channel: false`). With a scale for each channel, the default, uneven weights cost little, and it gains
    nothing or loses. A convolution, a linear or the batch norm after it divides a channel by a
    scale, and what reads the channel multiplies it back: convolutions, depthwise and grouped ones too, and linears,
    past ReLU, leaky ReLU, pooling and the gates of squeeze-and-excitation. Channels that anything else reads, such as a
    residual or a hard swish, stay.

    ReLU6 keeps its place: only those channels are scaled whose values on `calibration_batches` batches stay below half
    of 6 before and after, where ReLU6 is ReLU. On inputs that double them the outputs may change. Raises
    `EdgetuneError` for a model without such channels.
    """

    name: ClassVar[str] = "equalize"
    exact: ClassVar[bool] = True
    takes: ClassVar[Trait] = Trait.PLAIN

    calibration_batches: int = Field(default=8, ge=1)
    """Number of batches of training rows on which values before a ReLU6 are measured."""

    @property
    def needs(self) -> Needs:
        """Batches, to see which channels reach the 6 of a ReLU6."""
        return "batches"

    def for_rehearsal(self) -> Technique:
        """The same, measured on one batch."""
        return self.model_copy(update={"calibration_batches": 1})

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Scale in place. Raises `EdgetuneError`, and leaves the weights as they were, if that changes the outputs."""
        sample = self.require_sample(sample)
        refuse_unplain(model, self.name)
        recording = record(model, sample.inputs)
        groups = find_groups(model, recording, convolutions=True)
        if not groups:
            raise EdgetuneError(
                f"{type(model).__name__} has no channels to scale: no convolution or linear alone reads what another "
                "computes, as far as scales pass through what is in between",
                action="leave equalize out",
            )
        layers = [name for group in groups for name in group.layers]
        refuse_infinite(model, layers)
        cut_off = {group.producer.layer for group in groups if group.ceiling < math.inf}
        batches = [*sample.first_batches(self.calibration_batches), sample.inputs] if cut_off else []
        peaks = measure_peaks(model, sorted(cut_off), batches)
        norms = _normalized_layers(model, recording)
        scales = equalizing_scales(groups, norms, _folded_weights(model, groups, norms), peaks)
        with check_outputs(model, sample.inputs, layers):
            for group, factors in zip(groups, scales, strict=True):
                fold_scales(model, group, factors)
        return model


def equalizing_scales(
    groups: Sequence[ChannelGroup], norms: Mapping[str, str], weights: Mapping[str, Tensor], peaks: Mapping[str, Tensor]
) -> list[Tensor]:
    """For each group the scales `(channels,)` after which its layers have equal ranges of weights, sqrt(r1 / r2).

    A layer between two groups is scaled on both sides, so the groups take turns until nothing changes (eq. 11 of the
    paper, by what a channel is divided). `weights` are absolute values, changed in place. A scale is at least so large
    that twice the peak of its channel stays below the group's ceiling.
    """
    totals = [torch.ones(len(group.free), dtype=torch.double) for group in groups]
    for _ in range(_SWEEPS):
        largest_change = 0.0
        for group, total in zip(groups, totals, strict=True):
            own = weights[norms.get(group.producer.layer, group.producer.layer)]
            rows, read = own.flatten(1).amax(1), _read_ranges(group, weights)
            movable = group.free & (rows > 0) & (read > 0)
            scales = (rows / read.clamp(min=torch.finfo(torch.double).tiny)).sqrt()
            if group.ceiling < math.inf:
                lowest = _HEADROOM * peaks[group.producer.layer] / total / group.ceiling
                movable &= lowest <= 1
                scales = scales.maximum(lowest)
            scales = torch.where(movable, (scales * total).clamp(_LEAST, _MOST) / total, 1.0)
            total *= scales
            own /= scales.view(-1, *[1] * (own.dim() - 1))
            for name, channels in group.readers.items():
                weights[name].mul_(spread_inputs(scales[channels], weights[name]))
            largest_change = max(largest_change, float(scales.log().abs().amax()))
        if largest_change < _SETTLED:
            break
    return totals


def _read_ranges(group: ChannelGroup, weights: Mapping[str, Tensor]) -> Tensor:
    """The largest weight that each channel is multiplied by, `(channels,)`."""
    largest = torch.zeros(len(group.free), dtype=torch.double)
    for name, channels in group.readers.items():
        weight, parts = weights[name], len(channels) // weights[name].shape[1]
        inputs = weight.view(parts, -1, weight.shape[1], weight[0, 0].numel()).amax((1, 3)).flatten()
        largest.scatter_reduce_(0, channels, inputs, "amax")
    return largest


def _normalized_layers(model: nn.Module, recording: Recording) -> dict[str, str]:
    """The batch norms that directly follow a layer, and the layer of each."""
    pairs: dict[str, str] = {}
    for node in recording.graph.nodes:
        layer = normalized_layer(model, recording, node)
        if layer is not None:
            pairs[str(recording.layer(node.args[1]))] = layer
    return pairs


def _folded_weights(model: nn.Module, groups: Sequence[ChannelGroup], norms: Mapping[str, str]) -> dict[str, Tensor]:
    """The absolute weights of the layers of all groups, times what their batch norms multiply."""
    norm_of = {layer: norm for norm, layer in norms.items()}
    weights: dict[str, Tensor] = {}
    for name in dict.fromkeys(norms.get(layer, layer) for group in groups for layer in group.layers):
        weight = weight_of(model, name).detach().cpu().double().abs().contiguous()
        if name in norm_of:
            norm: Any = model.get_submodule(norm_of[name])
            gain = (norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()).abs().detach().cpu()
            weight *= gain.view(-1, *[1] * (weight.dim() - 1))
        weights[name] = weight
    return weights


def measure_peaks(model: nn.Module, layers: Sequence[str], batches: Iterable[Inputs]) -> dict[str, Tensor]:
    """The largest output of each channel of these layers over all batches, `(channels,)`."""
    with preserve_state(model), preserve_buffers(model), torch.no_grad(), _Peaks(model, layers) as peaks:
        for batch in batches:
            call(model, to_device(batch, device_of(model)))
    missing = [name for name in layers if name not in peaks.largest]
    if missing:
        raise EdgetuneError(
            f"no calibration batch reaches these layers: {truncate_list(missing)}",
            action="give more calibration batches",
        )
    largest: dict[str, Tensor] = peaks.largest
    return largest


class _Peaks(TorchFunctionMode):
    """Watches the functions that read the weights of layers, since a module may compute more than its function."""

    def __init__(self, model: nn.Module, layers: Iterable[str]) -> None:
        super().__init__()
        self.layers = {id(weight_of(model, name)): name for name in layers}
        self.largest: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        named = (self.layers.get(id(value)) for value in (*args, *(kwargs or {}).values()))
        name = next(filter(None, named), None)
        if name is not None and isinstance(output, Tensor) and output.dim() > 1:
            along = -1 if func is nn.functional.linear else 1
            peaks = output.detach().movedim(along, -1).flatten(0, -2).amax(0).double().cpu()
            self.largest[name] = peaks.maximum(self.largest[name]) if name in self.largest else peaks
        return output
