"""What every adapter of peft is as a technique: which layers get one, what trains beside it, and its merge."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from edgetune.adapt.frozen_base import restore_base
from edgetune.adapt.inject import OWNER, exact_targets, inject, refuse_adapters
from edgetune.adapt.layer_kinds import Kind, kind_of, split_fused
from edgetune.adapt.rewritten import INITIAL
from edgetune.core.errors import EdgetuneError
from edgetune.core.experts import select_adapted
from edgetune.core.layers import refuse_shared, select
from edgetune.core.merging import merge
from edgetune.core.peft_layers import TUNER, is_peft
from edgetune.core.technique import Sample, Technique
from edgetune.core.traits import Trait
from edgetune.lean.stages import blocks_of, names_before

Depth = Annotated[str, Field(pattern=r"^last-[1-9][0-9]*$")] | Annotated[float, Field(gt=0, lt=1)]


class Adapter(Technique):
    """Base of the techniques that train an adapter of peft's on chosen layers; `config` says which."""

    takes: ClassVar[Trait] = Trait.FROZEN | Trait.PACKED | Trait.LEAN
    leaves: ClassVar[Trait] = Trait.ADAPTED
    adapts: ClassVar[tuple[Kind, ...]]  # kinds of layers that it adapts rightly
    merges: ClassVar[bool] = True  # whether plain layers can compute the same

    targets: tuple[str, ...]
    """Patterns of the layers that get an adapter, such as `*.query`."""
    skip: tuple[str, ...] = ()
    """Patterns of layers to exclude from `targets`."""
    also_train: tuple[str, ...] = ()
    """Patterns of layers to train fully, such as a new classifier; they are saved with the adapter."""
    depth: Depth | None = None
    """Adapt only the last blocks and what follows them, `last-4` or a share of the blocks, so that backward ends there;
    by default all."""

    @property
    def rewrites(self) -> bool:
        """Whether these settings take the adapter's start out of the base weight."""
        return False

    @property
    def starts_exact(self) -> bool:
        """Whether the fresh adapter leaves the outputs, with these settings."""
        return self.exact

    def config(self, model: nn.Module, chosen: dict[str, nn.Module], targets: list[str] | str) -> Any:
        """peft's config for these layers, of which `targets` are the names. Raises for what cannot be adapted."""
        raise NotImplementedError

    def prepare(self, model: nn.Module) -> None:
        """Complete what peft put on the model, before it is checked. By default nothing."""

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Add the adapters, in place."""
        refuse_adapters(model)
        chosen = self.choose(model)
        whole = select(model, self.also_train) if self.also_train else {}
        _refuse_untrainable(model, whole)
        for name in chosen:
            inside = [outer for outer in whole if name == outer or name.startswith(outer + ".")]
            if inside:
                raise EdgetuneError(f"{name} is in both targets and also_train", got=inside[0], action="skip it in one")
        layers, fused = split_fused(chosen)
        every, names = [n for n, _ in model.named_modules() if n], [n for n in chosen if n not in fused]
        config = self.config(model, chosen, exact_targets(every, names))
        inject(
            model, config, layers, sample, exact=self.starts_exact, merges=self.merges, rewrites=self.rewrites,
            prepare=self.prepare,
        )  # fmt: skip
        for layer in whole.values():
            for parameter in layer.parameters():
                parameter.requires_grad_(True)
        return model

    def choose(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers that get an adapter, by name. Raises for those that this one cannot adapt."""
        norms = "norm" in self.adapts
        chosen = (
            select(model, self.targets, self.skip, accept=lambda layer: kind_of(layer) == "norm")
            if norms
            else select_adapted(
                model, self.targets, self.skip, self.name, accept=lambda m: kind_of(m) not in (None, "norm", "experts"),
                instead=None if "experts" in self.adapts else "use lora",
            )
        )  # fmt: skip
        if self.depth is not None:
            before = names_before(model, last_blocks(model, self.depth)[0])
            chosen = {name: layer for name, layer in chosen.items() if not before & {name, name.rpartition(".")[0]}}
            if not chosen:
                raise EdgetuneError("depth: all layers of targets are before these blocks", got=self.depth)
        for name, layer in chosen.items():
            if kind_of(layer) not in self.adapts:
                raise EdgetuneError(
                    _reason(name, layer, self.name), got=name, allowed=self.adapts, near="",
                    action=f'add "{name}" to skip',
                )  # fmt: skip
        return chosen

    def finalize(self, model: nn.Module) -> nn.Module:
        """Merge the adapters into plain layers. A 4-bit base becomes a plain linear layer of its original type."""
        if not self.merges:
            raise EdgetuneError(
                f"{self.name} cannot be merged: no plain layer computes what it does",
                action="save it with et.save_adapter, and train a family that merges to finalize or export",
            )
        model = merge(model, is_peft)
        for attribute in ("peft_config", TUNER, INITIAL):
            model.__dict__.pop(attribute, None)
        restore_base(model, OWNER)
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save the adapter in `folder/adapter`, unless its base layers were trained too."""
        from edgetune.adapt.files import save_adapter, trained_under

        if not trained_under(model):
            save_adapter(model, folder / "adapter")


def last_blocks(model: nn.Module, depth: str | float) -> list[str]:
    """The names of the blocks that `depth` covers."""
    blocks = blocks_of(model)
    if not blocks:
        raise EdgetuneError("depth: the model has no repeated blocks", got=depth, action="name the layers in targets")
    last = re.fullmatch(r"last-(\d+)", str(depth))
    count = int(last[1]) if last else max(1, round(float(depth) * len(blocks)))
    if count > len(blocks):
        raise EdgetuneError(f"depth: the model has {len(blocks)} blocks", got=depth, action=f"last-{len(blocks)}")
    return list(blocks[-count:])


def _reason(name: str, layer: Any, adapter: str) -> str:
    if getattr(layer, "groups", 1) > 1:
        return (
            f"{name} is a convolution in {layer.groups} groups: {adapter} would connect the groups, "
            "and a grouped convolution could not represent the merged weight"
        )
    return f"{name}: {adapter} cannot adapt a {type(layer).__name__} of this kind"


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
