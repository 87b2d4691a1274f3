"""Quantization-aware training: linears and tables train while they compute rounded, as a later step stores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs
from edgetune.core.quiet import silence_libraries
from edgetune.core.registry import require
from edgetune.core.technique import Needs, Sample, Technique
from edgetune.core.traits import Trait
from edgetune.quant.calibrated import round_plain
from edgetune.quant.fake import Rounding, merge_rounded, wrap_layers
from edgetune.quant.layers import TableBits, four_bits, table_grid
from edgetune.quant.roundable import choose_roundable, width_of
from edgetune.quant.rounding import LEAST_GROUP, Grid, GroupSize, absmax_codes, mse_codes
from edgetune.quant.teacher import add_teacher, latest_divergence, remove_teacher


class QAT(Technique):
    """Train with weights and activations rounded as `int4` or `int8_dynamic` will round them afterwards.

    What is not set is taken from that later step: which layers, their bits, groups and tables. Put `qat` after
    `lora` and `sparse-update`: an adapter is then rounded together with its weight, and merging rounds nothing again.
    Weights are rounded anew at each forward, and for backward instead of being saved; gradients pass straight through.
    With `gptq`, which `auto` is where there is a sample, layers start from weights that GPTQ rounded, those of a new
    adapter too, and train from there with its scales; frozen ones stay so. `finalize` leaves plain layers whose weights
    lie on the grid, and the later step stores exactly these, whatever its `algorithm`.

    `distill` adds the divergence from the model as it was before, of which a frozen copy runs beside the training, and
    switches off dropout, whose noise outweighs what rounding changes.
    """

    name: ClassVar[str] = "qat"
    takes: ClassVar[Trait] = Trait.ADAPTED | Trait.FROZEN | Trait.PACKED | Trait.LEAN
    leaves: ClassVar[Trait] = Trait.ROUNDED

    group_size: GroupSize = 32
    """Number of weights that share a scale in 4 bits, or `channel`; by default as in the later step."""
    targets: tuple[str, ...] = ("*",)
    """Patterns of the linear layers to round to 4 bits; by default as in the later step."""
    skip: tuple[str, ...] = ()
    """Patterns of linear layers and embedding tables to keep in floating point; by default as in the later step."""
    int8_linears: tuple[str, ...] = ()
    """Patterns of linear layers to round to 8 bits instead of 4; by default as in the later step."""
    pad: bool = False
    """As in the later step: whether it pads layers whose width does not fit. Those cannot be rounded, and are refused;
    without it they get 8 bits."""
    embeddings: TableBits = "int8"
    """Precision of embedding tables; by default as in the later step."""
    algorithm: Literal["auto", "absmax", "mse", "gptq"] = "auto"
    """How 4 bits are rounded: to nearest, with scales chosen at each forward (`absmax`, `mse`), or from GPTQ's rounding
    on, with its scales, unless an adapter was trained before (`gptq`); by default as in the later step."""
    calibration_batches: int = Field(default=8, ge=1)
    """Number of batches of training rows for `gptq`; by default as in the later step."""
    distill: float = Field(default=0.0, ge=0.0, le=1.0)
    """Weight of the divergence from the float model's outputs, which is added to the loss; 0: no copy is kept."""

    @property
    def width_multiple(self) -> int:
        """One group; of a whole channel, XNNPACK's least."""
        return LEAST_GROUP if self.group_size == "channel" else self.group_size

    @property
    def needs(self) -> Needs:
        """Batches for `gptq`."""
        return "batches" if self.algorithm == "gptq" else "nothing"

    def for_rehearsal(self) -> Technique:
        """The same layers, rounded to nearest."""
        return self.model_copy(update={"algorithm": "absmax"})

    def adapt_to(self, later: Sequence[Technique]) -> Technique:
        """Round as the first later step that stores integers."""
        settings = next((step.rounding for step in later if step.rounding), {})
        if settings.get("algorithm", "auto") not in ("auto", "absmax", "mse", "gptq"):
            raise EdgetuneError(
                "the step that quantizes would move scales between weights that were trained as they are rounded",
                got=settings["algorithm"],
                action="leave algorithm out there: it keeps these weights",
            )
        update = {name: value for name, value in settings.items() if name not in self.model_fields_set}
        if update.get("int8_linears", ()) is None:
            raise EdgetuneError(
                "the preset of the step that quantizes gives 8 bits to the head that it finds, and qat would train it "
                "in 4",
                action='write which: int8_linears: ["lm_head"] there, or int8_linears: [] for none',
            )
        return self.model_copy(update=update)

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Wrap the layers in place."""
        with silence_libraries():
            require("torchao", self.name)
        layers = choose_roundable(
            model, sample, {"targets": self.targets, "int8_linears": self.int8_linears}, self.skip,
            tables=self.embeddings != "none",
        )  # fmt: skip
        narrow, wide = layers.linears["targets"], layers.linears["int8_linears"]
        unfit = {name: layer for name, layer in narrow.items() if width_of(layer) % self.width_multiple}
        if self.pad and unfit:
            action = f"set pad: false in int4, which then gives them 8 bits, or skip: {list(unfit)}"
            raise EdgetuneError(
                "layers whose inputs are padded later cannot be rounded before", got=list(unfit), action=action
            )
        narrow, wide = {name: layer for name, layer in narrow.items() if name not in unfit}, wide | unfit
        calibrated = self.algorithm == "gptq" or (self.algorithm == "auto" and sample is not None)
        if self.distill:
            add_teacher(model)
        group_size = None if self.group_size == "channel" else self.group_size
        grid, eight = four_bits(group_size), Rounding(Grid(8), absmax_codes)  # scales no finer than the weights' type
        try:
            scales = round_plain(model, narrow, grid, self._batches(sample)) if calibrated else {}
        except BaseException:
            remove_teacher(model)
            raise
        four = Rounding(grid, mse_codes if self.algorithm == "mse" else absmax_codes)
        of_tables = table_grid(self.embeddings, group_size) or Grid(8)
        tables = {
            name: eight if width_of(table) % (of_tables.group_size or 1) else Rounding(of_tables, absmax_codes)
            for name, table in layers.tables.items()
        }
        wrap_layers(model, dict.fromkeys(narrow, four) | dict.fromkeys(wide, eight) | tables, scales)
        return model

    def _batches(self, sample: Sample | None) -> list[Inputs]:
        return self.require_sample(sample).first_batches(self.calibration_batches)

    def penalty(self, model: nn.Module) -> Tensor | None:
        """The weighted divergence of the last training forward."""
        divergence = latest_divergence(model)
        return None if divergence is None else self.distill * divergence

    def finalize(self, model: nn.Module) -> nn.Module:
        """Plain layers with the rounded weights; adapters inside are merged."""
        remove_teacher(model)
        return merge_rounded(model)
