"""Whole blocks taken out of a deep model, so that a shallower one of the same kind is left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.inputs import Inputs, call, logits_of
from edgetune.core.layers import matches, no_match_error
from edgetune.core.modes import preserve_state
from edgetune.core.technique import Needs, Sample, Technique
from edgetune.lean.stages import blocks_of
from edgetune.prune.changes import Changes
from edgetune.prune.config import follow_depth
from edgetune.prune.structure import add_entry, remember_config

_POSITIONS = ("layer_idx", "layer_id", "layer_index")  # of a block, as its own modules know it: the cache's entry
Lists = dict[str, dict[str, nn.Module]]  # of blocks: their container's name -> its key and the block


class Depth(Technique):
    """Remove whole blocks of a model that repeats them, such as the layers of an encoder, in place.

    Those that stay are spread evenly, the first and the last among them, or are given by their positions. DistilBERT
    starts like this (Sanh et al., 2019, arXiv:1910.01108, section 3). Every list of blocks keeps as many: encoder and
    decoder of a T5, the stages of a ResNet. A config of transformers follows, so that `from_pretrained` loads the
    result.

    The smaller model has lost what the blocks did: train it, best with the hidden states of the model before, by
    `train: {distill: {teacher: depth, hidden: 1}}`.
    """

    name: ClassVar[str] = "depth"

    blocks: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=0)], ...]
    """How many blocks stay, spread evenly, or the positions of those that stay, from 0, such as `[0, 2, 5]`."""
    lists: tuple[str, ...] = ()
    """Patterns of the names of lists of blocks, such as `*.decoder.layers`; by default every list of the commonest
    class of block."""

    @model_validator(mode="after")
    def _check_positions(self) -> Depth:
        if isinstance(self.blocks, tuple) and list(self.blocks) != sorted({*self.blocks}):
            raise EdgetuneError("blocks: positions must rise", got=self.blocks, action="write each once, in order")
        if self.blocks == ():
            raise EdgetuneError("blocks: no block would stay", got=[], action="give at least one position")
        return self

    @property
    def needs(self) -> Needs:
        """Example inputs, to run the result."""
        return "inputs"

    @torch.no_grad()
    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Shorten the lists in place. Raises `EdgetuneError`, with the model as it was, if it does not run then."""
        inputs = self.require_sample(sample).inputs
        lists = self._lists(model)
        kept = {name: self._kept(name, len(blocks)) for name, blocks in lists.items()}
        if all(len(positions) == len(lists[name]) for name, positions in kept.items()):
            counts = ", ".join(f"{name} has {len(blocks)}" for name, blocks in lists.items())
            raise EdgetuneError(f"every block would stay: {counts}", got=self.blocks, action="keep fewer blocks")
        for name, blocks in lists.items():
            _refuse_own_tensors(name, blocks, kept[name])
        changes = Changes()
        remember_config(model)
        with preserve_state(model):
            before = logits_of(call(model, inputs)).shape
            try:
                _shorten(model, lists, kept, changes)
                _follow(model, lists, kept, changes)
                _check_runs(model, inputs, before)
            except EdgetuneError:
                changes.undo()
                raise
        add_entry(model, {"blocks": {n: {"of": list(lists[n]), "keep": list(kept[n])} for n in lists}})
        return model

    def rebuild(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """The same blocks of a model as it came."""
        lists = self._lists(model)
        kept = {name: self._kept(name, len(blocks)) for name, blocks in lists.items()}
        _shorten(model, lists, kept, Changes())
        _follow(model, lists, kept, Changes())
        return model

    def _lists(self, model: nn.Module) -> Lists:
        """The lists of blocks to shorten. Raises `EdgetuneError` if there are none."""
        if self.lists:
            return _named_lists(model, self.lists)
        lists: Lists = {}
        for name in blocks_of(model):
            container, _, key = name.rpartition(".")
            lists.setdefault(container, {})[key] = model.get_submodule(name)
        if not lists:
            raise EdgetuneError(
                "the model has no repeated blocks",
                got=type(model).__name__,
                action="take units out of its layers with prune, or name a list of modules: lists",
            )
        return lists

    def _kept(self, name: str, count: int) -> tuple[int, ...]:
        """Positions of the blocks that stay in a list of `count`."""
        most = self.blocks if isinstance(self.blocks, int) else self.blocks[-1] + 1
        if most > count:
            raise EdgetuneError(
                f"{name or 'the model'} has {count} blocks",
                got=self.blocks if isinstance(self.blocks, int) else list(self.blocks),
                action=f"give at most {count}, or name the lists to shorten: lists"
                if isinstance(self.blocks, int)
                else f"give positions from 0 to {count - 1}",
            )
        return spread(self.blocks, count) if isinstance(self.blocks, int) else self.blocks


def spread(kept: int, count: int) -> tuple[int, ...]:
    """`kept` of `count` positions at equal distances, the first and the last among them.

    >>> spread(3, 6)
    (0, 2, 5)
    >>> spread(1, 6)
    (0,)
    """
    return tuple(position * (count - 1) // max(kept - 1, 1) for position in range(kept))


def _named_lists(model: nn.Module, patterns: tuple[str, ...]) -> Lists:
    containers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m)}
    lists: Lists = {}
    for pattern in patterns:
        matching = [name for name in containers if matches(name, [pattern])]
        if not matching:
            raise no_match_error("lists: the pattern matches no list of blocks", pattern, list(containers))
        lists |= {name: dict(containers[name].named_children()) for name in matching}
    return lists


def _refuse_own_tensors(name: str, blocks: Mapping[str, nn.Module], kept: tuple[int, ...]) -> None:
    """Raise if a block that goes has tensors that none of those that stay has, such as the positions of all blocks."""
    tensors = [set(block.state_dict()) for block in blocks.values()]
    remaining = set().union(*(tensors[position] for position in kept))
    for position, (key, own) in enumerate(zip(blocks, tensors, strict=True)):
        alone, enough = sorted(own - remaining), sorted({*kept, position})
        if position not in kept and alone:
            raise EdgetuneError(
                f"block {key} of {name or 'the model'} has what no block that stays has: {truncate_list(alone)}",
                got=list(kept),
                action=f"keep it: blocks: {enough}, or name other lists: lists",
            )


def _shorten(model: nn.Module, lists: Lists, kept: Mapping[str, tuple[int, ...]], changes: Changes) -> None:
    for name, blocks in lists.items():
        container = model.get_submodule(name)
        stay = {list(blocks)[position] for position in kept[name]}
        children = {key: child for key, child in container.named_children() if key not in blocks or key in stay}
        if all(key.isdigit() for key in container._modules):
            children = {str(position): child for position, child in enumerate(children.values())}
        changes.set(container, "_modules", children)
        for new, old in enumerate(kept[name]):
            _move(list(blocks.values())[old], old, new, changes)


def take_blocks(model: nn.Module, lists: Mapping[str, Mapping[str, list[Any]]]) -> None:
    """Shorten the lists as the history of a model says; its configs stay."""
    blocks = {
        n: {key: model.get_submodule(f"{n}.{key}".lstrip(".")) for key in each["of"]} for n, each in lists.items()
    }
    _shorten(model, blocks, {name: tuple(each["keep"]) for name, each in lists.items()}, Changes())


def _follow(model: nn.Module, lists: Lists, kept: Mapping[str, tuple[int, ...]], changes: Changes) -> None:
    follow_depth(model, {name: (len(blocks), kept[name]) for name, blocks in lists.items()}, changes)


def _move(block: nn.Module, old: int, new: int, changes: Changes) -> None:
    """The block's own modules know its position, at which they find their part of a cache."""
    for module in block.modules():
        for attribute in _POSITIONS:
            if getattr(module, attribute, None) == old:
                changes.set(module, attribute, new)


def _check_runs(model: nn.Module, inputs: Inputs, before: torch.Size) -> None:
    """Raise unless the shorter model takes the inputs and gives outputs of the same shape."""
    try:
        after = logits_of(call(model, inputs)).shape
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise EdgetuneError(
            f"without these blocks the model does not run: {reason}",
            action="keep the blocks that others need, such as the first of each stage: blocks: [0, ...]",
        ) from error
    if after != before:
        raise EdgetuneError(
            "without these blocks the outputs have another shape", got=f"{tuple(after)}, before: {tuple(before)}",
            action="keep the blocks that change shapes: blocks: [0, ...]",
        )  # fmt: skip
