"""LoRA through peft: low-rank side paths on chosen layers, saved and loaded in peft's own format.

Hu et al., 2021, arXiv:2106.09685: `W x + (alpha / rank) B A x`, with B = 0 at the start.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field
from torch import nn

from edgetune.adapt.inject import adapter_dtype, can_adapt, exact_targets, inject, refuse_adapters
from edgetune.core import trainable
from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import is_transposed, refuse_shared, select
from edgetune.core.merging import merge
from edgetune.core.peft_layers import is_peft
from edgetune.core.registry import require
from edgetune.core.technique import Sample, Technique
from edgetune.core.traits import Trait
from edgetune.lean.frozen import FrozenLayer, remove_hooks
from edgetune.lean.reads import FirstForward


class LoRA(Technique):
    """Train low-rank adapters on `targets`. The base stays frozen, or as an earlier sparse-update left it.

    The adapter is scaled by `alpha / rank`, or by `alpha / sqrt(rank)` with `rslora`. `dora` also trains the
    magnitude of each output row (Liu et al., 2024, arXiv:2402.09353). On a 16-bit model the adapters train in
    float32, because small updates are lost in 16 bits; the merged weight has the type of the model.
    """

    name: ClassVar[str] = "lora"
    takes: ClassVar[Trait] = Trait.FROZEN | Trait.PACKED | Trait.LEAN
    leaves: ClassVar[Trait] = Trait.ADAPTED
    exact: ClassVar[bool] = True

    rank: int = Field(8, ge=1)
    """Rank of each adapter."""
    alpha: int = Field(16, ge=1)
    """Scale of the adapter: `alpha / rank`, or with `rslora` `alpha` divided by the square root of `rank`."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the adapter's inputs that are dropped at random during training."""
    targets: tuple[str, ...]
    """Patterns of the layers that get an adapter, such as `*.query`."""
    skip: tuple[str, ...] = ()
    """Patterns of layers to exclude from `targets`."""
    also_train: tuple[str, ...] = ()
    """Patterns of layers to train fully, such as a new classifier; they are saved with the adapter."""
    rslora: bool = False
    """Divide `alpha` by the square root of `rank`, which suits high ranks."""
    dora: bool = False
    """Also train the magnitude of each output row (DoRA)."""

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Add the adapters, in place."""
        peft = require("peft", "lora")
        refuse_adapters(model)
        chosen = select(model, self.targets, self.skip, accept=can_adapt)
        whole = select(model, self.also_train) if self.also_train else {}
        _refuse_untrainable(model, whole)
        for name in chosen:
            inside = [outer for outer in whole if name == outer or name.startswith(outer + ".")]
            if inside:
                raise EdgetuneError(f"{name} is in both targets and also_train", got=inside[0], action="skip it in one")
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=exact_targets([name for name, _ in model.named_modules() if name], list(chosen)),
            use_rslora=self.rslora,
            use_dora=self.dora,
            fan_in_fan_out=all(is_transposed(layer) for layer in chosen.values()),
        )
        inject(model, config, chosen, adapter_dtype(chosen), sample)
        for layer in whole.values():
            for parameter in layer.parameters():
                parameter.requires_grad_(True)
        return model

    def finalize(self, model: nn.Module) -> nn.Module:
        """Merge the adapters into plain layers. A 4-bit base becomes a plain linear layer of its original type."""
        model = merge(model, is_peft)
        if hasattr(model, "peft_config"):
            del model.peft_config
        keep = trainable.is_chosen(model)  # the technique that chose keeps its batch norms frozen
        remove_hooks(model, FirstForward if keep else (FirstForward, FrozenLayer))
        trainable.recall(model, self.name)
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save the adapter in `folder/adapter`, unless its base layers were trained too."""
        from edgetune.adapt.files import save_adapter, trained_under

        if not trained_under(model):
            save_adapter(model, folder / "adapter")


def _refuse_untrainable(model: nn.Module, whole: dict[str, nn.Module]) -> None:
    """Raise for what cannot train whole: 4-bit weights, and weights tied to a layer that stays frozen."""
    for name, layer in whole.items():
        for inner, module in layer.named_modules(prefix=name):
            refuse_shared(model, {inner: module})
            for key, parameter in module.named_parameters(recurse=False):
                if not parameter.is_floating_point():
                    raise EdgetuneError(
                        f"{inner}.{key} is stored in {parameter.dtype} and cannot train", action="put it in skip of nf4"
                    )
