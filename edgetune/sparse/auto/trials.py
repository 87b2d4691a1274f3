"""What training one layer is worth, told by short trainings of nothing else (and the head)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from edgetune.core.inputs import Inputs, call, device_of, logits_of, moved
from edgetune.core.modes import undisturbed
from edgetune.lean.stages import blocks_of
from edgetune.sparse.auto.trace import Loss
from edgetune.sparse.scheme import Part, Slice
from edgetune.sparse.update import SparseUpdate
from edgetune.train import checkpoint
from edgetune.train.loop import train
from edgetune.train.settings import Train

By = Literal["magnitude", "gradient", "fisher"]
Labelled = tuple[Inputs, Tensor]


class Analysis(BaseModel):
    """Settings of a contribution analysis."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["fisher", "train"] = "fisher"
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)  # of the input channels, beside the whole layer
    by: By = "fisher"  # how the channels of a slice are chosen
    rows_at_once: int = Field(default=4, ge=1)  # fisher: rows whose gradients are squared together
    updates: int = Field(default=24, ge=1)  # train: of each short training
    learning_rate: float = Field(default=3e-4, gt=0)  # train
    seed: int = 0


class _Batches:
    """Ready batches as rows of a split, to be taken one at a time."""

    def __init__(self, batches: Sequence[Labelled]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def batch(self, indices: Sequence[int]) -> Labelled:
        (index,) = indices
        return self.batches[index]

    @property
    def lengths(self) -> None:
        return None


def by_training(
    model: nn.Module,
    parts: Mapping[str, Sequence[Part]],
    batches: Sequence[Labelled],
    held_out: Sequence[Labelled],
    loss: Loss,
    analysis: Analysis,
    head: Sequence[str],
) -> dict[str, dict[Part, float]]:
    """By how much the held-out loss falls more when a part trains than when the head alone does.

    `parts`: of each layer, the least first. A part whose biases train is worth what they add to those of all later
    blocks; a larger part never less than a smaller one.
    """
    fixed: dict[str, Part] = dict.fromkeys(head, "full")
    trial = _Trial(model, batches, held_out, loss, analysis)
    base = trial.loss_after(fixed)
    biases = [name for name, own in parts.items() if "bias" in own]
    values: dict[str, dict[Part, float]] = {name: {} for name in parts}
    earlier = 0.0
    for stage in _stages_from_the_end(model, biases):
        later = [name for name in biases if values[name]]
        gain = base - trial.loss_after({**fixed, **dict.fromkeys([*later, *stage], "bias")})
        for name in stage:
            values[name]["bias"] = max(0.0, gain - earlier) / len(stage)
        earlier = max(earlier, gain)
    for name, own in parts.items():
        least = values[name].get("bias", 0.0)
        for part in own:
            if part != "bias":
                least = max(least, base - trial.loss_after({**fixed, name: part}))
                values[name][part] = least
    return values


def _stages_from_the_end(model: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """The layers of each block, the last block first; what stands before the first block goes with it."""
    blocks = blocks_of(model)
    if not blocks:
        return [[name] for name in reversed(names)]
    stages: list[list[str]] = [[]]
    for name in names:
        inside = [n for n, block in enumerate(blocks) if name == block or name.startswith(block + ".")]
        if inside and inside[0] >= len(stages):
            stages += [[] for _ in range(inside[0] + 1 - len(stages))]
        stages[-1].append(name)
    return [stage for stage in reversed(stages) if stage]


class _Trial:
    """Short trainings, each from the same weights, with the same rows in the same order."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Labelled],
        held_out: Sequence[Labelled],
        loss: Loss,
        analysis: Analysis,
    ) -> None:
        self.model, self.batches, self.held_out, self.loss, self.analysis = model, batches, held_out, loss, analysis

    def loss_after(self, parts: Mapping[str, Part]) -> float:
        """The mean held-out loss after training these parts."""
        if not any(part != "frozen" for part in parts.values()):
            return self._measure()
        names = [n for n, m in self.model.named_modules() if any(p is not None for p in m._parameters.values())]
        written = {name: _by_magnitude(parts.get(name, "frozen")) for name in names}
        technique = SparseUpdate(scheme=written, head="frozen", norms=True)
        settings = Train(
            updates=self.analysis.updates, batch_size=1, learning_rate=self.analysis.learning_rate, schedule="linear"
        )
        modes = [(module, module.training) for module in self.model.modules()]
        state = checkpoint.random_state()
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        technique.apply(self.model)
        try:
            train(self.model, settings, _Batches(self.batches), self.loss, seed=self.analysis.seed)
            return self._measure()
        finally:
            technique.finalize(self.model)
            self.model.zero_grad(set_to_none=True)
            self.model.load_state_dict(before)
            checkpoint.set_random_state(state)
            for module, mode in modes:
                module.training = mode

    def _measure(self) -> float:
        device, total, count = device_of(self.model), 0.0, 0
        with undisturbed(self.model), torch.no_grad():
            for inputs, labels in self.held_out:
                logits = logits_of(call(self.model, moved(inputs, device)))
                total += self.loss(logits, labels.to(device)).item() * len(labels)
                count += len(labels)
        return total / count


def _by_magnitude(part: Part) -> Part:
    return part.model_copy(update={"by": "magnitude"}) if isinstance(part, Slice) else part
