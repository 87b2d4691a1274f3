"""LoRA through peft: low-rank side paths on chosen layers, saved and loaded in peft's own format.

Hu et al., 2021, arXiv:2106.09685: `W x + (alpha / rank) B A x`, with B = 0 at the start.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from edgetune.adapt.adapter import Adapter
from edgetune.adapt.layer_kinds import Kind
from edgetune.core.layers import is_transposed
from edgetune.core.registry import require


class LoRA(Adapter):
    """Train low-rank adapters on `targets`. The base stays frozen, or as an earlier sparse-update left it.

    The adapter is scaled by `alpha / rank`, or by `alpha / sqrt(rank)` with `rslora`. `dora` also trains the
    magnitude of each output row (Liu et al., 2024, arXiv:2402.09353). On a 16-bit model the adapters train in
    float32, because small updates are lost in 16 bits; the merged weight has the type of the model.
    """

    name: ClassVar[str] = "lora"
    exact: ClassVar[bool] = True
    adapts: ClassVar[tuple[Kind, ...]] = ("linear", "Conv1D", "conv1d", "conv2d 1x1", "conv2d", "conv3d", "embedding")

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

    def config(self, model: nn.Module, chosen: dict[str, nn.Module], targets: list[str] | str) -> Any:
        """peft's config for these layers."""
        return require("peft", self.name).LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            use_rslora=self.rslora,
            use_dora=self.dora,
            fan_in_fan_out=all(is_transposed(layer) for layer in chosen.values()),
        )
