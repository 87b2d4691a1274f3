"""4-bit weights in groups or per channel with 8-bit dynamic activations (8da4w), and embeddings of 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from edgetune.core.layers import matches
from edgetune.core.quiet import silence_libraries
from edgetune.core.registry import require
from edgetune.core.technique import Needs, Sample, Technique
from edgetune.core.traits import Trait
from edgetune.quant.layers import EIGHT_BITS, TableBits, choose_layers, describe_float_parts, four_bits, table_grid
from edgetune.quant.padded import rebuild_layers
from edgetune.quant.round_layers import Algorithm, round_layers
from edgetune.quant.rounding import LEAST_GROUP, GroupSize

Preset = Literal["smallest", "fastest", "closest"]
_PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    "smallest": {"group_size": "channel", "embeddings": "int4"},
    "fastest": {"group_size": "channel"},
    "closest": {"group_size": 32, "algorithm": "gptq", "calibration_batches": 16},
}
_HEADS = ("lm_head", "classifier", "classifier.*", "score", "head", "head.*", "fc", "qa_outputs")


class Int4(Technique):
    """Quantize linear weights to 4 bits, symmetric, with one scale for each `group_size` inputs of an output.

    `algorithm` says how they are rounded: to nearest with scales from the largest value (`absmax`) or of the least
    squared error (`mse`); by AWQ, which first scales inputs where the layer before can undo it and then weights errors
    by the sizes of the inputs (`awq`); or by GPTQ, where later columns make up for the rounding of earlier ones on
    calibration batches (`gptq`). `auto` is `gptq` where there is a sample, else `absmax`. GPTQ calibrates each block of
    the model on what the quantized blocks before it compute. A linear that no batch reaches is rounded to nearest, and
    a warning names it; if calibration fails, the model is as before.

    Activations are quantized dynamically to 8 bits per token, both in eager mode and in the exported program, so
    that both compute the same. Embedding tables get 8 bits with one scale per row or, with `embeddings="int4"`, 4
    bits with one scale for each `group_size` values of a row. Their `padding_idx` is dropped, which only affects
    gradients. A table that is read in another way than by looking up rows, such as Whisper's positions, stays in
    floating point; a warning names it unless `skip` does.

    Fused experts of a mixture (transformers' `experts.gate_up_proj` of three dims) become one linear for each expert,
    `experts.0.gate_up_proj`, so that they are quantized and a backend takes them; each then computes every token. With
    `skip: ["*.experts.*"]` they stay as they are, in floating point.

    `int8_linears` get 8 bits with one scale per output, rounded to nearest, for example for a head over a large
    vocabulary. A head that shares its weight with the embedding is untied: the head and the table are each quantized
    from the shared float weight, and `config.tie_word_embeddings` becomes False.

    A layer whose width `group_size`, or 32 for `channel`, does not divide gets 8 bits instead of 4, and a warning
    names it. With `pad`, such a linear gets zero inputs in addition, and 4 bits: the outputs are the same, and it
    stores a few zeros.

    `preset` gives defaults to the settings that are not written: `smallest` (a scale per channel, embeddings in 4
    bits), `fastest` (a scale per channel) or `closest` (groups of 32, `gptq` on 16 batches, the head in 8 bits).
    """

    name: ClassVar[str] = "int4"
    takes: ClassVar[Trait] = Trait.SPLIT
    leaves: ClassVar[Trait] = Trait.INTEGER

    group_size: GroupSize = 32
    """Number of weights that share a scale: a multiple of 32 that divides every input width, or `channel` for one
    scale per output, which XNNPACK runs faster; widths are then multiples of 32."""
    preset: Preset | None = None
    """Defaults for the other settings: `smallest`, `fastest` or `closest`."""
    algorithm: Algorithm | Literal["awq", "auto"] = "auto"
    """How weights are rounded; `auto`: `gptq` with calibration data, which every recipe has, else `absmax`."""
    calibration_batches: int = Field(default=8, ge=1)
    """Number of batches of training rows that `awq` and `gptq` calibrate on."""
    targets: tuple[str, ...] = ("*",)
    """Patterns of the linear layers to quantize."""
    skip: tuple[str, ...] = ()
    """Patterns of linear layers and embedding tables to keep in floating point."""
    int8_linears: tuple[str, ...] = ()
    """Patterns of linear layers to quantize to 8 bits instead of 4."""
    pad: bool = False
    """Pad the inputs of a linear whose width does not fit, instead of giving it 8 bits."""
    embeddings: TableBits = "int8"
    """Precision of embedding tables; `none`: floating point."""
    activation_bits: Literal[8] = 8
    """Bits of the activations, which are quantized dynamically."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, settings: Any) -> Any:
        preset = settings.get("preset") if isinstance(settings, dict) else None
        defaults = _PRESETS.get(preset, {}) if isinstance(preset, str) else {}  # type: ignore[call-overload]
        return {**defaults, **settings} if defaults else settings

    @property
    def width_multiple(self) -> int:
        """One group; of a whole channel, XNNPACK's least."""
        return LEAST_GROUP if self.group_size == "channel" else self.group_size

    @property
    def needs(self) -> Needs:
        """Batches for `awq` and `gptq`."""
        return "batches" if self.algorithm in ("awq", "gptq") else "nothing"

    @property
    def rounding(self) -> Mapping[str, object]:
        """All settings of the weights; `int8_linears` are `None` where the preset chooses them by the model."""
        names = type(self).model_fields.keys() - {"activation_bits", "preset"}
        settings = {name: getattr(self, name) for name in names}
        return settings | ({"int8_linears": None} if self._chooses_heads else {})

    def for_rehearsal(self) -> Technique:
        """The same layers, rounded to nearest."""
        return self.model_copy(update={"algorithm": "absmax"})

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Quantize in place. The modules keep their classes, but for `pad`, and run in eager mode, but the weights can
        no longer be trained."""
        with silence_libraries():
            require("torchao", self.name)
        if self.algorithm == "auto":
            algorithm: Algorithm | Literal["awq"] = "absmax" if sample is None else "gptq"
        else:
            algorithm = self.algorithm
        calibrates = algorithm in ("awq", "gptq")
        if calibrates:
            sample = self.require_sample(sample)
        group_size = None if self.group_size == "channel" else self.group_size
        grids = [(self.targets, four_bits(group_size))]
        if wide := self.int8_linears or self._heads(model):
            grids.append((wide, EIGHT_BITS))
        layers = choose_layers(
            self.name, model, sample, linears=grids, skip=self.skip,
            tables=table_grid(self.embeddings, group_size),
        ).fit_widths(self.pad)  # fmt: skip
        with layers.replace_weights(may_fail=calibrates):
            round_layers(layers, algorithm, sample, self.calibration_batches)
        return model

    def note(self, model: nn.Module) -> str:
        """What splitting experts costs, and the convolutions that stay in floating point."""
        return describe_float_parts(model)

    def rebuild(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """Split experts, quantized tables without their `padding_idx`, and padded linears."""
        return rebuild_layers(model, state)

    @property
    def _chooses_heads(self) -> bool:
        return self.preset == "closest" and "int8_linears" not in self.model_fields_set

    def _heads(self, model: nn.Module) -> tuple[str, ...]:
        """The linears that the preset keeps in 8 bits."""
        if not self._chooses_heads:
            return ()
        names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        heads = [name for name in names if any(fnmatchcase(name, pattern) for pattern in _HEADS)]
        return tuple(name for name in heads if matches(name, self.targets) and not matches(name, self.skip))
