"""Round the layers of a choice: to nearest, or by AWQ or GPTQ on calibration batches."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor

from edgetune.core.errors import truncate_list
from edgetune.core.technique import Sample
from edgetune.quant.awq import scale_inputs
from edgetune.quant.gptq import factor_hessian, gptq_codes
from edgetune.quant.hessians import calibrate
from edgetune.quant.layers import LayerChoice
from edgetune.quant.rounding import Grid, absmax_codes, codes_on_grid, mse_codes
from edgetune.quant.split import seen_by_weight
from edgetune.quant.unfinished import Unfinished

Algorithm = Literal["absmax", "mse", "gptq"]
_TO_NEAREST = {"absmax": absmax_codes, "mse": mse_codes}


def round_layers(
    layers: LayerChoice, algorithm: Algorithm | Literal["awq"], sample: Sample | None, calibration_batches: int
) -> None:
    """Give every layer its integer weight; linears in 4 bits by `algorithm`, all others rounded to nearest.

    With `awq` and `gptq`, a linear that no batch reaches is rounded to nearest, and a warning names it.
    """
    importance: dict[str, Tensor] = {}
    if algorithm == "awq":  # before any layer has integers
        assert sample is not None
        batches = sample.first_batches(calibration_batches)
        importance = scale_inputs(layers.model, layers.narrow, layers.grids, sample.inputs, batches)
    layers.prepare()
    _round_others(layers)
    if algorithm == "awq":
        for name, mean_squares in importance.items():
            seen = seen_by_weight(layers.linears[name], mean_squares.diag()).diagonal()
            layers.quantize(name, partial(mse_codes, importance=seen))
        _round_idle(layers, [name for name in layers.narrow if name not in importance])
        return
    if algorithm != "gptq":
        for name in layers.narrow:
            layers.quantize(name, _TO_NEAREST[algorithm])
        return
    assert sample is not None
    settled = [name for name, layer in layers.narrow.items() if codes_on_grid(layer.weight, layers.grids[name])]
    for name in settled:  # as after `qat`: there is nothing to make up for
        layers.quantize(name)
    if len(settled) == len(layers.narrow):
        return
    progress = sample.progress
    batches = sample.first_batches(calibration_batches)
    unfinished = Unfinished(sample.folder, f"{layers.technique}: {layers.grids}", layers.model, batches)
    done = unfinished.restore(layers.narrow, layers.grids)
    done.update(settled)
    remaining = {name: layer for name, layer in layers.narrow.items() if name not in done}

    def finish(names: list[str]) -> None:
        done.update(names)
        unfinished.store({name: layers.linears[name] for name in names}, len(done))
        progress("quantize", len(done), len(layers.narrow), names[-1] if names else "")

    idle = calibrate(layers.model, remaining, batches, partial(_quantize_by_gptq, layers), finish)
    unfinished.remove()
    _round_idle(layers, idle)


def _round_others(layers: LayerChoice) -> None:
    """Round tables, and linears in 8 bits, to nearest. Tables that share a weight, as those of T5 do, then share its
    integers."""
    narrow = layers.narrow
    keys = {name: (id(table.weight), layers.grids[name]) for name, table in layers.tables.items()}
    rounded: dict[tuple[int, Grid], Tensor] = {}
    for name, layer in layers.layers.items():
        if name in narrow:
            continue
        if name in keys and keys[name] in rounded:
            layer.weight = rounded[keys[name]]  # type: ignore[assignment]
        else:
            layers.quantize(name)
            if name in keys:
                rounded[keys[name]] = layer.weight


def _round_idle(layers: LayerChoice, idle: Sequence[str]) -> None:
    for name in idle:
        layers.quantize(name)
    if idle:
        warnings.warn(
            f"{layers.technique}: {truncate_list(idle)}: no calibration batch reaches these layers, so they are "
            "rounded to nearest",
            stacklevel=5,  # the caller of `et.apply`
        )


def _quantize_by_gptq(layers: LayerChoice, name: str, hessian: Tensor) -> None:
    factor = factor_hessian(seen_by_weight(layers.linears[name], hessian), name)
    layers.quantize(name, partial(gptq_codes, factor=factor))
