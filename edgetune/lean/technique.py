"""Lean operators as a technique: whatever trains, its forward saves less for backward.

The operators look at what trains at every call, so they may be applied before or after anything that changes that.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from edgetune.core.technique import Sample, Technique
from edgetune.core.traits import OPEN, Trait
from edgetune.lean.operators import Activations, put_on_operators, take_off_operators


class Lean(Technique):
    """Save less for backward, whatever trains: with `lora`, with full fine-tuning, in any training loop.

    Gradients equal autograd's; with `activations="8bit"` they are approximate, with bounds stated in
    `edgetune/lean/activations.py` and `products.py`. `sparse-update` includes these operators.
    """

    name: ClassVar[str] = "lean"
    takes: ClassVar[Trait] = OPEN
    leaves: ClassVar[Trait] = Trait.LEAN
    exact: ClassVar[bool] = True

    activations: Activations = "exact"
    """Precision of the values saved for backward; `8bit` needs less memory and makes gradients approximate."""

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Add hooks to the model, in place."""
        put_on_operators(model, self.activations)
        return model

    def finalize(self, model: nn.Module) -> nn.Module:
        """Remove the hooks, unless sparse-update needs them on."""
        take_off_operators(model)
        return model
