"""GLoRA: weight and bias of a linear moved by five supports, whose forms are chosen layer by layer.

Chavan et al., 2023, arXiv:2306.07967: `W x + b` becomes `(W + W A + B) x + C W + D b + E + b`, with `A` and `D` by
element. All of it merges into the weight and the bias.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator
from torch import nn

from edgetune.adapt.frozen_base import freeze_base, restore_base
from edgetune.adapt.supports import GLoRALinear, SupportPath
from edgetune.core.errors import EdgetuneError
from edgetune.core.experts import select_adapted
from edgetune.core.layers import matches, no_match_error, refuse_shared, replace
from edgetune.core.merging import merge
from edgetune.core.plain import refuse_computed
from edgetune.core.technique import Sample, Technique
from edgetune.core.traits import Trait
from edgetune.lean.reads import refuse_read_elsewhere


class GLoRA(Technique):
    """Train five supports beside the weight and the bias of each linear in `targets`; the base stays frozen.

    Without `paths` this is a supernet: each training step takes a random form of every support, and a later
    `glora-search` settles each layer on one. With `paths` the forms are given. `finalize` merges the supports into
    plain linears, at no cost afterwards; a bias appears where there was none. As with any adapter, layers that an
    earlier sparse-update chose train as well.
    """

    name: ClassVar[str] = "glora"
    takes: ClassVar[Trait] = Trait.FROZEN | Trait.LEAN
    leaves: ClassVar[Trait] = Trait.ADAPTED
    exact: ClassVar[bool] = True

    rank: int = Field(4, ge=1)
    """Largest rank of a supernet; it also has a half and a quarter of it."""
    targets: tuple[str, ...]
    """Patterns of the linear layers to adapt."""
    skip: tuple[str, ...] = ()
    """Patterns of layers to exclude from `targets`."""
    paths: dict[str, SupportPath] | None = None
    """The form of each support, by layer pattern; a later pattern takes precedence. `A` and `B` are `low-rank`, a
    `vector`, a `scalar` or `none`, `C` is `low-rank`, a `vector` or `none`, `D` and `E` a `vector`, a `scalar` or
    `none`: by default the first of each, of `rank` 4. `null`: a supernet."""

    @model_validator(mode="after")
    def _not_empty(self) -> GLoRA:
        if self.paths is not None and not self.paths:
            raise ValueError('no path given; write paths: {"*": {A: none, B: low-rank}}, or leave it out')
        return self

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Wrap the layers in place."""
        chosen = select_adapted(model, self.targets, self.skip, self.name, nn.Linear)
        paths = {name: self._path(name) for name in chosen}
        for pattern in self.paths or ():
            if not any(matches(name, [pattern]) for name in chosen):
                raise no_match_error("paths: the pattern matches no target", pattern, chosen)
        bare = [name for name, path in paths.items() if path is None]
        if bare:
            raise EdgetuneError(
                "paths: these targets have none", got=bare, action='begin with "*", or add them to skip'
            )
        for name, layer in chosen.items():
            refuse_computed(name, layer)
        refuse_shared(model, chosen)
        refuse_read_elsewhere(model, chosen, sample)
        freeze_base(model, self.name)
        for name, layer in chosen.items():
            replace(model, name, GLoRALinear(layer, paths[name], supernet=self.paths is None))  # type: ignore[arg-type]
        return model

    def finalize(self, model: nn.Module) -> nn.Module:
        """Merge the supports into plain linears; what is still a supernet, with all of them."""
        model = merge(model, lambda layer: isinstance(layer, GLoRALinear))
        restore_base(model, self.name)
        return model

    def _path(self, name: str) -> SupportPath | None:
        if self.paths is None:
            return SupportPath(rank=self.rank)
        return next((self.paths[pattern] for pattern in reversed(self.paths) if matches(name, [pattern])), None)
