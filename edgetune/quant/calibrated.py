"""Weights that GPTQ rounded, in floating point, as the start of a training that rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core.carriers import is_wrapped, plain_layer
from edgetune.core.inputs import Inputs
from edgetune.core.layers import parameter_owners
from edgetune.core.peft_layers import is_tuner
from edgetune.quant.blocks import round_by_rows
from edgetune.quant.fake import dense_weight
from edgetune.quant.gptq import factor_hessian, gptq_codes
from edgetune.quant.hessians import calibrate
from edgetune.quant.rounding import Grid, dequantize


def round_plain(
    model: nn.Module, layers: Mapping[str, nn.Module], grid: Grid, batches: Sequence[Inputs]
) -> dict[str, Tensor]:
    """Give these layers weights that GPTQ rounded on the batches; returns their scales, by name.

    Each gets a new parameter, and a copy of the model that shares the old one keeps it. So does the layer inside an
    adapter that is not trained yet and adds nothing. Other adapters, slices, tied layers and those that no batch
    reaches stay as they are. If this raises, all do.
    """
    owners = parameter_owners(dict(model.named_modules()))
    inner: dict[str, Any] = {name: plain_layer(layer) for name, layer in layers.items() if _computes_own_weight(layer)}
    plain = {name: layer for name, layer in inner.items() if len(owners[id(layer.weight)]) == 1}
    scales: dict[str, Tensor] = {}
    before = {name: layer.weight for name, layer in plain.items()}

    @torch.no_grad()
    def quantize(name: str, hessian: Tensor) -> None:
        layer, factor = plain[name], factor_hessian(hessian, name)
        rounded = round_by_rows(layer.weight, grid, partial(gptq_codes, factor=factor))
        values = dequantize(rounded, grid, layer.weight.dtype)
        layer.weight, scales[name] = nn.Parameter(values, requires_grad=layer.weight.requires_grad), rounded.scales

    try:
        calibrate(model, plain, batches, quantize)
    except BaseException:
        for name, layer in plain.items():
            layer.weight = before[name]
        raise
    return scales


def _computes_own_weight(layer: nn.Module) -> bool:
    """Whether it is plain, or an adapter in floating point that adds nothing to its layer yet."""
    if not is_tuner(layer):
        return not is_wrapped(layer)
    inner: Any = plain_layer(layer)
    return isinstance(inner, nn.Linear) and not is_wrapped(inner) and torch.equal(dense_weight(layer), inner.weight)
