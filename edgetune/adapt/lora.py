"""LoRA through peft: low-rank side paths on chosen layers, saved and loaded in peft's own format.

Hu et al., 2021, arXiv:2106.09685: `W x + (alpha / rank) B A x`, with B = 0 at the start.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator
from torch import nn

from edgetune.adapt.adapter import Adapter
from edgetune.adapt.inject import remove
from edgetune.adapt.layer_kinds import Kind, kind_of, split_fused, widths_of
from edgetune.adapt.rewritten import remember_factors
from edgetune.adapt.starts import Measured, start_from_inputs, start_from_rounding
from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import is_transposed
from edgetune.core.packed_layers import is_nf4
from edgetune.core.peft_layers import is_tuner
from edgetune.core.registry import require
from edgetune.core.technique import Needs, Sample, Technique


class LoRA(Adapter):
    """Train low-rank adapters on `targets`. The base stays frozen, or as an earlier sparse-update left it.

    The adapter is scaled by `alpha / rank`, or by `alpha / sqrt(rank)` with `rslora`. `dora` also trains the
    magnitude of each output row (Liu et al., 2024, arXiv:2402.09353). The fused experts of a mixture, such as
    `*.experts.down_proj`, get an adapter for each expert. On a 16-bit model the adapters train in
    float32, because small updates are lost in 16 bits; the merged weight has the type of the model.
    """

    name: ClassVar[str] = "lora"
    exact: ClassVar[bool] = True
    adapts: ClassVar[tuple[Kind, ...]] = (
        "linear", "Conv1D", "conv1d", "conv2d 1x1", "conv2d", "conv3d", "embedding",
        "experts",
    )  # fmt: skip

    rank: int = Field(8, ge=1)
    """Rank of each adapter."""
    alpha: int = Field(16, ge=1)
    """Scale of the adapter: `alpha / rank`, or with `rslora` `alpha` divided by the square root of `rank`."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the adapter's inputs that are dropped at random during training."""
    rslora: bool = False
    """Divide `alpha` by the square root of `rank`, which suits high ranks."""
    dora: bool = False
    """Also train the magnitude of each output row (DoRA)."""

    init: Literal["default", "pissa", "olora", "corda", "orthogonal", "eva", "loftq"] = "default"
    """How the adapter starts: `pissa` and `olora` take the principal part out of the weight and train it (Meng et al.,
    2024, arXiv:2404.02948; Büyükakyüz, 2024, arXiv:2406.01775), `corda` the principal part on the inputs of calibration
    batches (Yang et al., 2024, arXiv:2406.05223); `orthogonal` starts both factors orthogonal, `eva` the first one in
    the main directions of those inputs, with one rank in all layers (Paischer et al., 2024, arXiv:2410.07170); `loftq`
    starts at what `nf4` rounded off, so that the model begins nearer to the one before (Li et al., 2023,
    arXiv:2310.08659)."""
    calibration_batches: int = Field(8, ge=1)
    """Batches of the sample for `corda` and `eva`."""
    frozen_a: bool = False
    """Train only the second factor (LoRA-FA); the layer's input is then not saved for backward, only its projection."""

    @property
    def rewrites(self) -> bool:
        """Whether the start is taken out of the base weight."""
        return self.init in ("pissa", "olora", "corda")

    @property
    def needs(self) -> Needs:
        """Batches, to start from the inputs of layers."""
        return "batches" if self.init in get_args(Measured) else "nothing"

    @property
    def reads_unpacked(self) -> bool:
        """Whether it starts at what packing rounded off."""
        return self.init == "loftq"

    def for_rehearsal(self) -> Technique:
        """One batch gives the same structure."""
        return self.model_copy(update={"calibration_batches": 1})

    @model_validator(mode="after")
    def _fit_together(self) -> LoRA:
        if self.rewrites and (self.rslora or self.dora):
            raise ValueError(f"init: {self.init} works with neither rslora nor dora: it cannot be saved as a LoRA")
        if self.init == "loftq" and self.dora:
            raise ValueError("init: loftq works without dora, whose magnitudes are those of the rounded weight")
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError("rank: must be even for init: orthogonal")
        return self

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Add the adapters, in place."""
        plain = dict(model.named_modules())
        model = super().apply(model, sample)
        layers = {name: module for name, module in model.named_modules() if is_tuner(module)}
        try:
            self._start(model, layers, sample)
        except EdgetuneError:
            remove(model, {name: plain[name] for name in layers})
            raise
        if self.rewrites:
            remember_factors(model, list(layers))
        if self.frozen_a:
            freeze_first_factors(layers.values())
        return model

    def _start(self, model: nn.Module, layers: dict[str, nn.Module], sample: Sample | None) -> None:
        """Start the fresh adapters as peft's config does not."""
        if self.init == "loftq":
            start_from_rounding(layers)
        elif self.init in ("eva", "corda"):
            batches = self.require_sample(sample).first_batches(self.calibration_batches)
            start_from_inputs(self.init, model, layers, batches)

    def config(self, model: nn.Module, chosen: dict[str, nn.Module], targets: list[str] | str) -> Any:
        """peft's config for these layers."""
        for name, layer in chosen.items():
            if kind_of(layer) == "experts" and (self.dropout or self.dora):
                setting = "dora" if self.dora else "dropout"
                raise EdgetuneError(
                    f"{name}: {setting} does not work on the fused experts of a mixture", got=getattr(self, setting),
                    action=f'set it to {"false" if self.dora else 0}, or add "*.experts.*" to skip',
                )  # fmt: skip
            if self.init != "default" and not (
                kind_of(layer) == "linear" and (is_nf4(layer) == (self.init == "loftq") or self.init == "eva")
            ):
                kind = "a 4-bit weight" if is_nf4(layer) else f"a {type(layer).__name__}"
                wants = " but on a 4-bit weight of nf4" if self.init == "loftq" else ""
                raise EdgetuneError(
                    f"{name}: init {self.init} cannot start on {kind}{wants}", got=self.init, allowed=["default"],
                    action=f'add "{name}" to skip, or use init: default',
                )  # fmt: skip
            if self.init != "default" and self.rank > min(widths_of(layer)):
                message = f"{name}: the rank is above the layer's width, which has no more directions to start in"
                raise EdgetuneError(message, got=self.rank, action=f"set rank to {min(widths_of(layer))} at most")
        return require("peft", self.name).LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            target_parameters=split_fused(chosen)[1] or None,
            use_rslora=self.rslora,
            use_dora=self.dora,
            init_lora_weights=self.init if self.init in ("pissa", "olora", "orthogonal") else True,
            fan_in_fan_out=all(is_transposed(layer) for layer in chosen.values()),
        )


def freeze_first_factors(layers: Iterable[Any]) -> None:
    """Train only the second factor of these layers."""
    for layer in layers:
        for factors in (layer.lora_A, layer.lora_embedding_A):
            factors.requires_grad_(False)
