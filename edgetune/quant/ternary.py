"""Ternary weights: -1, 0 and 1 times a scale, trained from a pretrained model."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from edgetune.core.quiet import silence_libraries
from edgetune.core.registry import require
from edgetune.core.technique import Sample, Technique
from edgetune.core.traits import Trait
from edgetune.quant.fake import FakeQuantizedLinear, Rounding, WeightRule, merge_rounded, wrap_layers
from edgetune.quant.roundable import choose_roundable
from edgetune.quant.rounding import Codes, Grid
from edgetune.quant.teacher import add_teacher, latest_divergence, remove_teacher


class Ternary(Technique):
    """Train linears with weights of -1, 0 or 1 times the mean magnitude of their output, and activations in 8 bits.

    BitNet b1.58 (Ma et al., 2024, arXiv:2402.17764), as in the MatMul-free language model (Zhu et al., 2024,
    arXiv:2406.02528), but from pretrained weights: over the first `blend_batches` training batches each weight moves
    from its own value to the ternary one. Gradients pass straight through the rounding. `finalize` leaves plain layers
    with these weights. No kernel of ExecuTorch stores fewer than 4 bits, so put `int4` after it, which keeps them
    exactly: the program is as large and as fast as any in 4 bits, and the quality is lower than that of `qat`. Keep the
    head and the first layers in `skip`.
    """

    name: ClassVar[str] = "ternary"
    takes: ClassVar[Trait] = Trait.ADAPTED | Trait.FROZEN | Trait.PACKED | Trait.LEAN
    leaves: ClassVar[Trait] = Trait.ROUNDED

    targets: tuple[str, ...] = ("*",)
    """Patterns of the linear layers to make ternary."""
    skip: tuple[str, ...] = ()
    """Patterns of layers to exclude from `targets`."""
    blend_batches: int = Field(default=0, ge=0)
    """Number of training batches over which the weights move from their own values to ternary ones; 0: at once."""
    distill: float = Field(default=0.0, ge=0.0, le=1.0)
    """Weight of the divergence from the float model's outputs, which is added to the loss; 0: no copy is kept."""

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Wrap the layers in place."""
        with silence_libraries():
            require("torchao", self.name)
        layers = choose_roundable(model, sample, {"targets": self.targets}, self.skip, tables=False)
        if self.distill:
            add_teacher(model)
        rounding = Rounding(Grid(4, scale_dtype=torch.bfloat16), ternary_codes, keeps=False)
        linear = partial(TernaryLinear, blend_batches=self.blend_batches)
        wrap_layers(model, dict.fromkeys(layers.linears["targets"], rounding), linear=linear)
        return model

    def penalty(self, model: nn.Module) -> Tensor | None:
        """The weighted divergence of the last training forward."""
        divergence = latest_divergence(model)
        return None if divergence is None else self.distill * divergence

    def finalize(self, model: nn.Module) -> nn.Module:
        """Plain layers with the ternary weights; adapters inside are merged."""
        remove_teacher(model)
        return merge_rounded(model)


class TernaryLinear(FakeQuantizedLinear):
    """A linear whose weight moves from its own values to ternary ones over its first training batches."""

    batches: Tensor

    def __init__(self, *settings: Any, blend_batches: int) -> None:
        super().__init__(*settings)
        self.blend_batches = blend_batches
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def weight_rule(self) -> WeightRule:
        """In training mode part of the way to the ternary weight, at first; the gradient is that of the whole way."""
        batches = int(self.batches)
        if not self.training or batches >= self.blend_batches:
            return self.round
        if torch.is_grad_enabled():
            self.batches += 1
        share = (batches + 1) / (self.blend_batches + 1)
        return lambda dense: torch.lerp(dense, self.rounding(dense), share)


def ternary_codes(weight: Tensor, grid: Grid) -> Codes:
    """Codes of -1, 0 and 1 in steps of the mean magnitude of each group, or of each output."""
    groups, dtype = grid.split(weight.float()), grid.scale_dtype or weight.dtype
    scales = groups.abs().mean(-1).clamp(min=torch.finfo(dtype).smallest_normal).to(dtype)
    codes = (groups / scales.float().unsqueeze(-1)).round_().clamp_(-1, 1)
    return Codes(codes.to(torch.int8).flatten(1), scales)
