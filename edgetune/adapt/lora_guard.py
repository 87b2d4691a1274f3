"""LoRA-Guard: a harmfulness score from a language model's own body, whose generation stays as it is.

Elesedy et al., 2024, arXiv:2407.02987: the guard shares the frozen weights of the chat model, and has low-rank
adapters and a classification head of its own, which generation does not go through.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from edgetune.adapt.frozen_base import freeze_base, restore_base
from edgetune.adapt.guard_files import save_guard
from edgetune.adapt.guarded import GuardedModel
from edgetune.adapt.layer_kinds import kind_of, widths_of
from edgetune.core.carriers import plain_layer
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import device_of
from edgetune.core.layers import select
from edgetune.core.modes import preserve_state
from edgetune.core.technique import Sample, Technique
from edgetune.core.traits import Trait


class LoRAGuard(Technique):
    """Train a classifier of texts on a frozen causal language model, which generates as before, to the bit.

    The model becomes the `base` of a module that returns the logits of `classes`: from the state of the last token,
    computed with a low-rank path beside each of `targets`. The paths and the head are all that trains. Nothing merges.
    `et.save_guard` writes them to a small file, and `et.export_language` writes one program that generates and has a
    method `guard`. A recipe loads the model as a language model, and its data have the classes.
    """

    name: ClassVar[str] = "lora_guard"
    takes: ClassVar[Trait] = Trait.PACKED | Trait.LEAN  # what trains in the base would change what it generates
    leaves: ClassVar[Trait] = Trait.ADAPTED
    guards: ClassVar[bool] = True

    targets: tuple[str, ...]
    """Patterns of the linears that get a low-rank path, such as `*.q_proj`."""
    skip: tuple[str, ...] = ()
    """Patterns of layers to exclude from `targets`."""
    rank: int = Field(8, ge=1)
    """Rank of each path."""
    alpha: int = Field(16, ge=1)
    """Scale of the paths, times the rank: `alpha / rank`."""
    classes: tuple[str, ...] = Field(("harmless", "harmful"), min_length=2)
    """Names of the classes, in the order of the labels; in a recipe those of the data."""

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Freeze the model, and return it as the base of a `GuardedModel`."""
        base: Any = model
        getter = getattr(base, "get_output_embeddings", None)
        if getter is None or getter() is None or getattr(base, "base_model", base) is base:
            raise EdgetuneError(
                "a guard needs a language model of transformers, with a body and a head over its vocabulary",
                got=type(model).__name__,
                action="load it with AutoModelForCausalLM",
            )
        layers = self._layers(model)
        _refuse_uncalled(base, layers)
        freeze_base(model, self.name)
        guarded = self._guarded(model, layers)
        for note in [name for name in vars(model) if name.startswith("edgetune_")]:  # what is open on the whole
            setattr(guarded, note, vars(model).pop(note))
        return guarded

    def finalize(self, model: nn.Module) -> nn.Module:
        """The guard stays; what was trainable before is so again."""
        restore_base(model, self.name)
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save the guard as `folder/guard.safetensors`."""
        save_guard(model, folder / "guard.safetensors")

    def rebuild(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """The same module, untrained."""
        return self._guarded(model, self._layers(model))

    def _layers(self, model: nn.Module) -> dict[str, nn.Module]:
        return select(model, self.targets, self.skip, accept=lambda m: kind_of(plain_layer(m)) in ("linear", "Conv1D"))

    def _guarded(self, base: nn.Module, layers: Mapping[str, nn.Module]) -> GuardedModel:
        widths = {name: widths_of(plain_layer(layer)) for name, layer in layers.items()}
        return GuardedModel(base, widths, self).to(device_of(base))


@torch.no_grad()
def _refuse_uncalled(base: Any, layers: Mapping[str, nn.Module]) -> None:
    """Raise for a layer that the body does not call, such as the head: a path beside it would do nothing."""
    called: set[str] = set()
    with ExitStack() as hooks, preserve_state(base):
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(lambda *_, name=name: called.add(name)))
        base.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device_of(base)), use_cache=False)
    uncalled = [name for name in layers if name not in called]
    if uncalled:
        raise EdgetuneError(
            "the model's body does not call these layers", got=uncalled, action=f'add "{uncalled[0]}" to skip'
        )
