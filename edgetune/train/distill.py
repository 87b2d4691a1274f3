"""Distillation: a smaller or coarser model learns from the logits and the hidden states of a larger one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.core.divergence import mean_divergence
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs, call, logits_of, tensors_in, token_mask
from edgetune.core.modes import preserve_state
from edgetune.data.rows import IGNORED_LABEL
from edgetune.lean.stages import blocks_of
from edgetune.train.settings import Distill


class Distillation:
    """A teacher that runs beside the training. Inside its context, the outputs of both models' blocks are kept."""

    def __init__(self, model: nn.Module, teacher: nn.Module, settings: Distill) -> None:
        self.teacher, self.settings = teacher, settings
        taught = blocks_of(teacher) if settings.hidden else []
        own = (blocks_of(model) or _last_of(model, taught)) if settings.hidden else []
        for each, names in ((model, own), (teacher, taught)):
            if settings.hidden and not names:
                problem = f"distill.hidden: {type(each).__name__} has no repeated blocks"
                raise EdgetuneError(problem, action="leave hidden out")
        self.own, self.taught = HiddenStates(model, own), HiddenStates(teacher, taught)

    def __enter__(self) -> Distillation:
        self.own.watch()
        self.taught.watch()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.own.close()
        self.taught.close()

    def loss(self, loss: Tensor, logits: Tensor, inputs: Inputs, labels: Tensor) -> Tensor:
        """The labels' `loss` with the teacher's, after the model gave `logits` for the inputs."""
        with torch.no_grad():
            target = logits_of(call(self.teacher, inputs))
        soft = soft_loss(logits, target, labels, self.settings.temperature)
        loss = (1 - self.settings.weight) * loss + self.settings.weight * soft
        if self.settings.hidden:
            loss = loss + self.settings.hidden * hidden_loss(self.own.states, self.taught.states, token_mask(inputs))
        return loss


@torch.no_grad()
def check_hidden(model: nn.Module, teacher: nn.Module, settings: Distill, example: Inputs) -> None:
    """Raise before a training if the two have no hidden states in common."""
    with Distillation(model, teacher, settings) as distillation, preserve_state(model), preserve_state(teacher):
        for each in (model, teacher):
            call(each, example)
        hidden_loss(distillation.own.states, distillation.taught.states, None)


class HiddenStates:
    """The outputs of a model's blocks at its latest call, in their order."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.blocks = [model.get_submodule(name) for name in names]
        self.states: list[Tensor] = []
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def watch(self) -> None:
        """Keep the outputs from now on."""
        for place, block in enumerate(self.blocks):
            self.handles.append(block.register_forward_hook(self._at(place)))

    def _at(self, place: int) -> Callable[[nn.Module, object, object], None]:
        def keep(_: nn.Module, __: object, output: object) -> None:
            if place == 0:
                self.states = []
            self.states.append(next(tensors_in(output)))

        return keep

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.states = []


def _last_of(model: nn.Module, taught: Sequence[str]) -> list[str]:
    """The only block of a model that has one left of the teacher's: by itself it repeats nothing."""
    modules = dict(model.named_modules())
    return [name for name in taught if name in modules]


def soft_loss(logits: Tensor, target: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from the teacher's logits at `temperature`, times its square, averaged over labels.

    Hinton, Vinyals, Dean: Distilling the knowledge in a neural network, 2015, section 2. Logits `(batch, classes)`,
    or `(batch, tokens, classes)` if each position has a label. For numbers, the mean squared difference.
    """
    if logits.shape != target.shape:
        raise EdgetuneError(
            f"the teacher's logits {tuple(target.shape)} do not fit the model's {tuple(logits.shape)}",
            action="take a teacher with the same classes",
        )
    if labels.is_floating_point():
        return functional.mse_loss(logits, target)
    if labels.dim() == 2:
        keep = labels.ne(IGNORED_LABEL)
        logits, target = logits[keep], target[keep]
    return mean_divergence(logits / temperature, target / temperature) * temperature**2


def hidden_loss(states: Sequence[Tensor], taught: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Mean squared difference of hidden states from the teacher's, relative to the teacher's mean square.

    Block m of M learns from block m N / M of the teacher's N, rounded up, both counted from 1: TinyBERT's uniform
    mapping (Jiao et al., 2020, arXiv:1909.10351, section 3). The mean over the blocks. States `(rows, tokens, width)`
    without the tokens that are not in `mask`, or of any other equal shapes.
    """
    differences = []
    for place, state in enumerate(states, start=1):
        target = taught[-(-place * len(taught) // len(states)) - 1]
        if state.shape != target.shape:
            raise EdgetuneError(
                f"distill.hidden: block {place} gives hidden states of another shape than the teacher's",
                got=f"{tuple(state.shape)}, the teacher's {tuple(target.shape)}",
                action="leave hidden out: logits alone fit models of any width",
            )
        if mask is not None and mask.shape == state.shape[:-1]:
            state, target = state[mask], target[mask]
        difference = functional.mse_loss(state.float(), target.float())
        differences.append(difference / target.float().square().mean().clamp_min(1e-12))
    return torch.stack(differences).mean()
