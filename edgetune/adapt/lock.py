"""Locked tuning of a pair of towers: one stays as it was pretrained, the other learns to agree with it.

LiT, Zhai et al., 2021, arXiv:2111.07991: a locked image tower, and a text tower that trains with the contrastive loss.
CAPIVARA, dos Santos et al., 2023, arXiv:2310.13683: the same in little memory, by LoRA and gradient checkpointing in
the tower that learns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from edgetune.core import trainable
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs, call
from edgetune.core.modes import preserve_state
from edgetune.core.technique import Sample, Technique
from edgetune.core.traits import Trait
from edgetune.lean.frozen import FrozenStage, remove_hooks

Tower = Literal["vision", "audio", "text"]
_PARTS: dict[Tower, tuple[str, tuple[str, ...], str]] = {  # the tower, its projection, and the method of its features
    "vision": ("vision_model", ("visual_projection", "vision_projection"), "get_image_features"),
    "audio": ("audio_model", ("audio_projection",), "get_audio_features"),
    "text": ("text_model", ("text_projection",), "get_text_features"),
}


class LockedTower(FrozenStage):
    """A tower in eval mode and without a graph. Raises where something in it trains all the same."""

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        """Switch dropout and recording off."""
        training = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        if training and torch.is_grad_enabled():
            raise EdgetuneError(
                "something in the locked tower trains",
                got=training,
                action="name the layers of the other tower in the targets, such as text_model.*.q_proj",
            )
        return super().enter(module, args, kwargs)


class Lock(Technique):
    """Freeze one tower of a model such as CLIP, and train the other, or adapters on it, to agree with it.

    The locked tower runs in eval mode and saves nothing for backward; its blocks could run once for all epochs
    (`et.locked_features`). The other tower's blocks run again in backward instead of saving what is inside them. For
    the models of transformers with two towers, such as CLIP, SigLIP and CLAP, in a loop of your own with
    `et.contrastive_loss`: the models of recipes have one tower.
    """

    name: ClassVar[str] = "lock"
    takes: ClassVar[Trait] = Trait.PACKED
    leaves: ClassVar[Trait] = Trait.FROZEN
    exact: ClassVar[bool] = True

    tower: Tower = "vision"
    """The tower that is locked."""
    projection: Literal["locked", "trained"] = "locked"
    """Whether the layer after the locked tower trains, as a new one does between towers of two models."""
    checkpointing: bool = True
    """Run the blocks of the other tower again in backward, instead of saving what is inside them."""

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Lock the tower, in place."""
        locked, other = _towers(model, self.tower)
        blocks = [module for module in other.modules() if hasattr(module, "gradient_checkpointing")]
        if self.checkpointing and not blocks:
            raise EdgetuneError(
                f"{type(other).__name__} cannot run its blocks again", got=True, action="set checkpointing to false"
            )
        trainable.remember(model, self.name)
        projection = [getattr(model, name) for name in _PARTS[self.tower][1] if hasattr(model, name)]
        for module in (locked, *(projection if self.projection == "locked" else ())):
            module.requires_grad_(False)
            LockedTower().put_on(module)
        for block in blocks if self.checkpointing else ():
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        return model

    def finalize(self, model: nn.Module) -> nn.Module:
        """Unlock it: what was trainable before is so again."""
        remove_hooks(model, LockedTower)
        for module in _towers(model, self.tower)[1].modules() if self.checkpointing else ():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
        trainable.recall(model, self.name)
        return model


def locked_features(model: nn.Module, inputs: Inputs, tower: Tower = "vision") -> Tensor:
    """The features `(rows, width)` of a locked tower, projected and of length 1, to be computed once for all epochs.

    `inputs` are those of `get_image_features`, `get_audio_features` or `get_text_features`. The similarities of a
    batch are then `scale * other_features @ locked_features[rows].T`.
    """
    method = getattr(model, _PARTS[tower][2], None)
    if method is None:
        raise no_towers_error(model)
    with preserve_state(model), torch.no_grad():
        output: Any = call(method, inputs)
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return functional.normalize(features, dim=-1)


def no_towers_error(model: nn.Module) -> EdgetuneError:
    """The error for a model that has no two towers."""
    return EdgetuneError(
        f"{type(model).__name__} has no two towers",
        got=[name for name, _ in model.named_children()],
        allowed=[f"{parts[0]} beside text_model" for tower, parts in _PARTS.items() if tower != "text"],
        near="",
        action="give a model such as CLIPModel; to freeze a part of another, use sparse-update",
    )


def _towers(model: nn.Module, tower: Tower) -> tuple[Any, Any]:
    """The tower of that kind, and the other one."""
    towers = {kind: getattr(model, parts[0]) for kind, parts in _PARTS.items() if hasattr(model, parts[0])}
    if len(towers) != 2 or "text" not in towers:
        raise no_towers_error(model)
    if tower not in towers:
        raise EdgetuneError(f"{type(model).__name__} has no such tower", got=tower, allowed=list(towers))
    (other,) = (module for kind, module in towers.items() if kind != tower)
    return towers[tower], other
