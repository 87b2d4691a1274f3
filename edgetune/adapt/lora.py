"""LoRA through peft: low-rank side paths on chosen layers, saved and loaded in peft's own format.

Hu et al., 2021, arXiv:2106.09685: `W x + (alpha / rank) B A x`, with B = 0 at the start.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from edgetune.adapt.adapter import Adapter
from edgetune.adapt.layer_kinds import Kind, kind_of, split_fused
from edgetune.adapt.rewritten import remember_factors
from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import is_transposed
from edgetune.core.packed_layers import is_nf4
from edgetune.core.peft_layers import is_tuner
from edgetune.core.registry import require
from edgetune.core.technique import Sample


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

    init: Literal["default", "pissa", "olora", "orthogonal"] = "default"
    """How the adapter starts: `pissa` and `olora` take the principal part out of the weight and train it (Meng et al.,
    2024, arXiv:2404.02948; Büyükakyüz, 2024, arXiv:2406.01775), `orthogonal` starts both factors orthogonal."""
    frozen_a: bool = False
    """Train only the second factor (LoRA-FA); the layer's input is then not saved for backward, only its projection.
    peft's files do not record it: an adapter from a file trains both."""

    @property
    def rewrites(self) -> bool:
        """Whether the start is taken out of the base weight."""
        return self.init in ("pissa", "olora")

    @model_validator(mode="after")
    def _fit_together(self) -> LoRA:
        if self.rewrites and (self.rslora or self.dora):
            raise ValueError(f"init: {self.init} works with neither rslora nor dora: it cannot be saved as a LoRA")
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError("rank: must be even for init: orthogonal")
        return self

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Add the adapters, in place."""
        model = super().apply(model, sample)
        layers = [(name, module) for name, module in model.named_modules() if is_tuner(module)]
        if self.rewrites:
            remember_factors(model, [name for name, _ in layers])
        for _, layer in layers if self.frozen_a else ():
            for factors in (layer.lora_A, layer.lora_embedding_A):
                factors.requires_grad_(False)  # type: ignore[union-attr, operator]
        return model

    def config(self, model: nn.Module, chosen: dict[str, nn.Module], targets: list[str] | str) -> Any:
        """peft's config for these layers."""
        for name, layer in chosen.items():
            if kind_of(layer) == "experts" and (self.dropout or self.dora):
                setting = "dora" if self.dora else "dropout"
                raise EdgetuneError(
                    f"{name}: {setting} does not work on the fused experts of a mixture", got=getattr(self, setting),
                    action=f'set it to {"false" if self.dora else 0}, or add "*.experts.*" to skip',
                )  # fmt: skip
            plain = kind_of(layer) == "linear" and not is_nf4(layer)
            if self.init != "default" and not plain:
                kind = "a 4-bit weight" if is_nf4(layer) else f"a {type(layer).__name__}"
                raise EdgetuneError(
                    f"{name}: init {self.init} cannot start on {kind}", got=self.init, allowed=["default"],
                    action=f'add "{name}" to skip, or use init: default',
                )  # fmt: skip
        return require("peft", self.name).LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            target_parameters=split_fused(chosen)[1] or None,
            use_rslora=self.rslora,
            use_dora=self.dora,
            init_lora_weights=True if self.init == "default" else self.init,
            fan_in_fan_out=all(is_transposed(layer) for layer in chosen.values()),
        )
