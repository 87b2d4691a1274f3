"""4-bit weights in groups or per channel with 8-bit dynamic activations (8da4w), and embeddings of 8 or 4 bits."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from itertools import islice
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from edgetune.core.errors import truncate_list
from edgetune.core.quiet import silence_libraries
from edgetune.core.registry import require
from edgetune.core.technique import Needs, Sample, Technique
from edgetune.core.traits import Trait
from edgetune.quant.blocks import quantize_weight
from edgetune.quant.gptq import factor_hessian, gptq_codes
from edgetune.quant.hessians import calibrate
from edgetune.quant.layers import LayerChoice, TableBits, choose_layers, drop_padding_indices, table_grid
from edgetune.quant.rounding import Grid, absmax_codes, mse_codes
from edgetune.quant.unfinished import Unfinished

_LEAST_GROUP = 32  # XNNPACK takes its multiples, also as the width of a channel
GroupSize = Annotated[int, Field(ge=_LEAST_GROUP, multiple_of=_LEAST_GROUP)] | Literal["channel"]
_ROUNDING = {"absmax": absmax_codes, "mse": mse_codes}


class Int4(Technique):
    """Quantize linear weights to 4 bits, symmetric, with one scale for each `group_size` inputs of an output.

    `algorithm` says how they are rounded: to nearest with scales from the largest value (`absmax`) or of the least
    squared error (`mse`), or by GPTQ, where later columns make up for the rounding of earlier ones on calibration
    batches (`gptq`); `auto` is `gptq` where there is a sample, else `absmax`. GPTQ calibrates each block of the model
    on what the quantized blocks before it compute. A linear that no batch reaches is rounded to nearest, and a warning
    names it; if calibration fails, the model is as before.

    Activations are quantized dynamically to 8 bits per token, both in eager mode and in the exported program, so
    that both compute the same. Embedding tables get 8 bits with one scale per row or, with `embeddings="int4"`, 4
    bits with one scale for each `group_size` values of a row. Their `padding_idx` is dropped, which only affects
    gradients. A table that is read in another way than by looking up rows, such as Whisper's positions, stays in
    floating point; a warning names it unless `skip` does.

    `int8_linears` get 8 bits with one scale per output, rounded to nearest, for example for a head over a large
    vocabulary. A head that shares its weight with the embedding is untied: the head and the table are each quantized
    from the shared float weight, and `config.tie_word_embeddings` becomes False. Raises `EdgetuneError` for a width
    that `group_size`, or 32 for `channel`, does not divide.
    """

    name: ClassVar[str] = "int4"
    leaves: ClassVar[Trait] = Trait.INTEGER

    group_size: GroupSize = 32
    """Number of weights that share a scale: a multiple of 32 that divides every input width, or `channel` for one
    scale per output, which XNNPACK runs faster; widths are then multiples of 32."""
    algorithm: Literal["auto", "absmax", "mse", "gptq"] = "auto"
    """How weights are rounded; `auto`: `gptq` with calibration data, which every recipe has, else `absmax`."""
    calibration_batches: int = Field(default=8, ge=1)
    """Number of batches of training rows that `gptq` calibrates on."""
    targets: tuple[str, ...] = ("*",)
    """Patterns of the linear layers to quantize."""
    skip: tuple[str, ...] = ()
    """Patterns of linear layers and embedding tables to keep in floating point."""
    int8_linears: tuple[str, ...] = ()
    """Patterns of linear layers to quantize to 8 bits instead of 4."""
    embeddings: TableBits = "int8"
    """Precision of embedding tables; `none`: floating point."""
    activation_bits: Literal[8] = 8
    """Bits of the activations, which are quantized dynamically."""

    @property
    def width_multiple(self) -> int:
        """One group; of a whole channel, XNNPACK's least."""
        return _LEAST_GROUP if self.group_size == "channel" else self.group_size

    @property
    def needs(self) -> Needs:
        """Batches for `gptq`."""
        return "batches" if self.algorithm == "gptq" else "nothing"

    def for_rehearsal(self) -> Technique:
        """The same layers, rounded to nearest."""
        return self.model_copy(update={"algorithm": "absmax"})

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Quantize in place. The modules keep their classes and run in eager mode, but the weights can no longer be
        trained."""
        with silence_libraries():
            require("torchao", self.name)
        calibrated = self.algorithm == "gptq" or (self.algorithm == "auto" and sample is not None)
        sample = self.require_sample(sample) if calibrated else sample
        layers = choose_layers(
            self.name, model, sample, targets=self.targets, wide=self.int8_linears or None,
            skip=self.skip, embeddings=self.embeddings,
        )  # fmt: skip
        group_size = None if self.group_size == "channel" else self.group_size
        reason = "group_size" if group_size else "the width that 4-bit kernels take,"
        layers.check_widths(self.width_multiple, reason, tables=self.embeddings == "int4")
        grid = Grid(4, group_size, scale_dtype=torch.bfloat16)  # as XNNPACK stores the scales of 4 bits
        with layers.replace_weights(may_fail=calibrated):
            layers.quantize_tables(table_grid(self.embeddings, group_size))
            layers.quantize_wide()
            if calibrated:
                assert sample is not None
                self._quantize_calibrated(layers, grid, sample)
            else:
                rule = _ROUNDING["absmax" if self.algorithm == "auto" else self.algorithm]
                for layer in layers.narrow.values():
                    layer.weight = quantize_weight(layer.weight, grid, rule, rounds_activations=True)
        return model

    def rebuild(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """Quantized tables without their `padding_idx`."""
        return drop_padding_indices(model, state)

    def _quantize_calibrated(self, layers: LayerChoice, grid: Grid, sample: Sample) -> None:
        """GPTQ of the linears in 4 bits; those that no batch reaches are rounded to nearest."""

        def quantize(name: str, hessian: Tensor) -> None:
            layer, factor = layers.linears[name], factor_hessian(hessian, name)
            rule = partial(gptq_codes, factor=factor)
            layer.weight = quantize_weight(layer.weight, grid, rule, rounds_activations=True)

        def finish(names: list[str]) -> None:
            nonlocal done
            done += len(names)
            unfinished.store({name: layers.linears[name] for name in names}, done)
            sample.progress("quantize", done, len(layers.narrow), names[-1] if names else "")

        batches = list(islice(sample.batches(), self.calibration_batches))
        unfinished = Unfinished(sample.folder, self.model_dump_json(), layers.model, batches)
        restored = unfinished.restore(layers.narrow, dict.fromkeys(layers.narrow, grid))
        remaining = {name: layer for name, layer in layers.narrow.items() if name not in restored}
        done = len(restored)
        idle = calibrate(layers.model, remaining, batches, quantize, finish)
        unfinished.remove()
        for name in idle:
            layer = layers.linears[name]
            layer.weight = quantize_weight(layer.weight, grid, rounds_activations=True)
        if idle:
            warnings.warn(
                f"{self.name}: {truncate_list(idle)}: no calibration batch reaches these layers, so they are rounded "
                "to nearest",
                stacklevel=4,  # the caller of `et.apply`
            )
