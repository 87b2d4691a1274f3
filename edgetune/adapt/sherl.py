"""SHERL: the states of frozen early blocks, consolidated without what they repeat, regulate what the late blocks read.

Diao et al., 2024, arXiv:2407.07523, and its authors' code (github.com/Paranioar/SHERL). No gradient enters the early
blocks: their forward builds no graph, and backward ends at the first late one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from edgetune.adapt.frozen_base import freeze_base, restore_base
from edgetune.adapt.widths import first_input, read_widths
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import device_of
from edgetune.core.layers import select
from edgetune.core.technique import Needs, Sample, Technique
from edgetune.core.traits import Trait
from edgetune.lean.stages import blocks_of

_CHILD = "sherl"  # of the first late block
_TEMPERATURE = 0.1  # of the gate, as in the authors' code


class EarlyRoute(nn.Module):
    """From the states `(..., width)` before and after each early block to what the first late block reads.

    Each state is projected to `hidden` values. Each but the last gets a weight for each token: its agreement with the
    last one, divided by its redundancy, the sum of its positive cosine similarities to all of them. The weighted sum
    and the last one are projected back and added to the last state, which a gate scales. The authors' gate begins at 0
    and ours at 1, and the norm of what is added at 0: so that nothing changes at the start.
    """

    def __init__(self, states: int, width: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden)) for _ in range(states))
        self.agreement = nn.Linear(hidden, 1)
        self.up, self.norm = nn.Linear(hidden, width), nn.LayerNorm(width)
        nn.init.zeros_(self.norm.weight)
        self.gate = nn.Parameter(torch.zeros(1))
        self.states: list[Tensor] = []  # of the forward that is running

    def forward(self, states: list[Tensor]) -> Tensor:
        """What the first late block reads in place of the last state."""
        last = states[-1]
        *others, guide = [down(state.to(self.gate.dtype)) for down, state in zip(self.down, states, strict=True)]
        early = torch.stack(others, -2)  # (..., states - 1, hidden)
        unit = functional.normalize(early, dim=-1)
        redundancy = (unit @ unit.transpose(-1, -2)).relu().sum(-1, keepdim=True)
        weights = self.agreement(early * guide.unsqueeze(-2)).relu() / redundancy
        weights = weights / weights.sum(-2, keepdim=True).clamp(min=1e-8)
        consolidated = (weights * early).sum(-2) + guide
        added: Tensor = self.norm(self.up(consolidated.relu()))
        return (1 + torch.tanh(self.gate / _TEMPERATURE)) * last + added.to(last.dtype)

    def put_on(self, early: list[nn.Module], late: nn.Module) -> None:
        """Collect the states of the early blocks, and become a child of the first late one, which reads the result."""
        early[0].register_forward_pre_hook(self.begin, with_kwargs=True)
        for block in early:
            block.register_forward_hook(self.record)
        late.add_module(_CHILD, self)
        late.register_forward_pre_hook(self.replace_input, with_kwargs=True)

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start with what the first block takes."""
        self.states[:] = [first_input(args, kwargs).detach()]

    def record(self, _: nn.Module, args: object, output: Any) -> None:
        """Add what a block returns."""
        self.states.append((output[0] if isinstance(output, tuple) else output).detach())

    def replace_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give the late block the regulated state in place of its input."""
        state = self(list(self.states))
        self.states.clear()
        if args:
            return (state, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): state}


class SHERL(Technique):
    """Train a small network beside the frozen blocks of a model, which saves next to nothing of them for backward.

    It reads the states of all blocks but the `late` last ones, and changes what the first of those reads; backward goes
    through these alone. Layers after the blocks train if an earlier sparse-update chose them, such as a new classifier.
    Nothing merges: the network stays, as `sherl` in the first late block, and is exported with the model. For models
    whose blocks have states of one shape, such as transformers; example inputs are needed, from which that is read.
    """

    name: ClassVar[str] = "sherl"
    takes: ClassVar[Trait] = Trait.FROZEN | Trait.PACKED | Trait.LEAN
    leaves: ClassVar[Trait] = Trait.ADAPTED
    exact: ClassVar[bool] = True

    width: int = Field(16, ge=1)
    """Number of values to which each state is projected."""
    late: int = Field(1, ge=1)
    """Number of last blocks that backward goes through."""
    blocks: tuple[str, ...] = ()
    """Patterns of the blocks, in order; by default the repeated blocks of the model."""

    @property
    def needs(self) -> Needs:
        """Example inputs, for the widths of the states."""
        return "inputs"

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Put the network in, in place."""
        early, late = self._blocks(model)
        widths = read_widths(model, {name: model.get_submodule(name) for name in early}, sample)
        if len({width for pair in widths.values() for width in pair}) > 1:
            raise EdgetuneError("the blocks have states of different widths", got=widths, action="name equal blocks")
        first = early[0]
        freeze_base(model, self.name)
        training = [n for n in early if any(p.requires_grad for p in model.get_submodule(n).parameters())]
        if training:
            restore_base(model, self.name)
            raise EdgetuneError(
                "no gradient reaches these blocks, and an earlier step chose them to train",
                got=training,
                action="leave them out of the scheme of sparse-update",
            )
        route = EarlyRoute(len(early) + 1, widths[first][0], self.width).to(device_of(model))
        route.put_on([model.get_submodule(name) for name in early], model.get_submodule(late))
        return model

    def finalize(self, model: nn.Module) -> nn.Module:
        """The network stays; what was trainable before is so again."""
        restore_base(model, self.name)
        return model

    def rebuild(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """The network, with the widths that it has in `state`."""
        early, late = self._blocks(model)
        width = state[f"{late}.{_CHILD}.norm.weight"].shape[0]
        route = EarlyRoute(len(early) + 1, width, self.width)
        route.put_on([model.get_submodule(name) for name in early], model.get_submodule(late))
        return model

    def _blocks(self, model: nn.Module) -> tuple[list[str], str]:
        """The names of the early blocks, and of the first late one."""
        names = list(select(model, self.blocks)) if self.blocks else blocks_of(model)
        if len(names) <= self.late:
            message = f"{self.late} late and at least one early block are needed"
            raise EdgetuneError(message, got=names, action="lower late, or name the blocks with blocks")
        late = names[-self.late]
        block = model.get_submodule(late)
        if isinstance(block, (nn.Sequential, nn.ModuleList)):
            raise EdgetuneError(f"{late} runs all its children, so none can be added", got=type(block).__name__)
        if hasattr(block, _CHILD):
            raise EdgetuneError(f"{late} has a network of sherl already", got=late)
        return names[: -self.late], late
