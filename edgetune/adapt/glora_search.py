"""Evolution over the paths of a trained GLoRA supernet, within a number of parameters.

Chavan et al., 2023, arXiv:2306.07967: the fittest paths of a population cross and mutate.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import islice
from math import prod
from pathlib import Path
from typing import ClassVar

import torch
import yaml
from pydantic import Field
from torch import nn

from edgetune.adapt.supports import FORMS, GLoRALinear, SupportPath, draw_path
from edgetune.core.errors import EdgetuneError
from edgetune.core.files import write_atomically
from edgetune.core.inputs import call, device_of, logits_of, to_device
from edgetune.core.modes import preserve_buffers, preserve_state
from edgetune.core.technique import Needs, Sample, Technique
from edgetune.core.traits import OPEN, Trait

_Paths = tuple[SupportPath, ...]  # of the layers, in the model's order
_KEYS = (*FORMS, "rank")


class GLoRASearch(Technique):
    """After `glora` without `paths` and its training: settle each layer on the forms that lose least.

    The loss is that on labelled batches in evaluation mode, each path a slice of the trained supernet. What was not
    chosen goes, and the rest trains on, in one more `train` step. The paths are stored in `paths.yaml`, in the format
    of a recipe, so that a later `glora` begins with them.
    """

    name: ClassVar[str] = "glora-search"
    takes: ClassVar[Trait] = OPEN

    max_parameters: int = Field(ge=1)
    """The most values that the supports of all layers may have together."""
    population: int = Field(20, ge=2)
    """How many choices of paths each generation tries."""
    parents: int = Field(8, ge=1)
    """How many of the fittest so far the next generation comes from."""
    generations: int = Field(10, ge=0)
    """How often a new generation is made of the fittest; 0: the best of a random population."""
    mutation: float = Field(0.2, ge=0, le=1)
    """The chance of each form to be drawn anew in a mutated choice, which is every second one."""
    batches: int = Field(4, ge=1)
    """How many labelled batches the loss is measured on."""

    @property
    def needs(self) -> Needs:
        """Labels, for the loss."""
        return "labels"

    def for_rehearsal(self) -> Technique:
        """The better of two random choices on one batch."""
        return self.model_copy(update={"generations": 0, "population": 2, "batches": 1})

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Settle the layers on the fittest paths, in place."""
        sample = self.require_sample(sample)
        layers = [layer for layer in model.modules() if isinstance(layer, GLoRALinear) and layer.supernet]
        if not layers:
            raise EdgetuneError(
                "there is no supernet to search",
                action="put glora without paths, and a train step, before glora-search",
            )
        largest = [layer.path for layer in layers]
        try:
            paths, loss = self._fittest(layers, self._loss_on(model, layers, sample), sample)
        finally:
            for layer, path in zip(layers, largest, strict=True):
                layer.path = path
        for layer, path in zip(layers, paths, strict=True):
            layer.settle(path)
            layer.searched_loss = loss
        return model

    def note(self, model: nn.Module) -> str:
        """How many parameters were chosen, and their loss."""
        layers = [layer for layer in model.modules() if isinstance(layer, GLoRALinear)]
        if not layers:
            return ""
        size = sum(count(layer, layer.path) for layer in layers)
        return f"{size:,} parameters in {len(layers)} layers, with a loss of {layers[0].searched_loss:.4g}"

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save the paths in `folder/paths.yaml`."""
        paths = {name: m.path.model_dump() for name, m in model.named_modules() if isinstance(m, GLoRALinear)}
        text = yaml.safe_dump({"targets": list(paths), "paths": paths}, sort_keys=False)
        write_atomically(folder / "paths.yaml", f"# {self.note(model)}\n{text}")

    def _fittest(
        self, layers: Sequence[GLoRALinear], loss_on: Callable[[_Paths], float], sample: Sample
    ) -> tuple[_Paths, float]:
        """The paths of least loss that evolution comes to, and that loss."""
        chance = random.Random(int(torch.randint(2**31, ())))  # as reproducible as torch's generator
        losses: dict[_Paths, float] = {}
        fittest: list[_Paths] = []
        for generation in range(self.generations + 1):
            for number in range(self.population):
                if not generation:
                    paths = tuple(draw_path(layer.path.rank) for layer in layers)
                elif number % 2:
                    paths = tuple(
                        self._mutate(path, layer, chance)
                        for path, layer in zip(chance.choice(fittest), layers, strict=True)
                    )
                else:
                    paths = tuple(
                        _cross(*pair, chance)
                        for pair in zip(chance.choice(fittest), chance.choice(fittest), strict=True)
                    )
                paths = within(layers, paths, self.max_parameters, chance)
                if paths not in losses:
                    losses[paths] = loss_on(paths)
            fittest = sorted(losses, key=losses.__getitem__)[: self.parents]
            sample.progress(self.name, generation, self.generations, f"loss {losses[fittest[0]]:.4g}")
        return fittest[0], losses[fittest[0]]

    def _mutate(self, path: SupportPath, layer: GLoRALinear, chance: random.Random) -> SupportPath:
        other = draw_path(layer.path.rank)
        return path.model_copy(update={key: getattr(other, key) for key in _KEYS if chance.random() < self.mutation})

    def _loss_on(self, model: nn.Module, layers: Sequence[GLoRALinear], sample: Sample) -> Callable[[_Paths], float]:
        """A function that gives the mean loss of paths, in evaluation mode."""
        labelled, loss = sample.labels()
        batches, device = list(islice(labelled(), self.batches)), device_of(model)

        def measure(paths: _Paths) -> float:
            for layer, path in zip(layers, paths, strict=True):
                layer.path = path
            with preserve_state(model), preserve_buffers(model), torch.no_grad():
                values = [
                    float(loss(logits_of(call(model, to_device(inputs, device))), labels.to(device)))
                    for inputs, labels in batches
                ]
            return sum(values) / len(values)

        return measure


def count(layer: GLoRALinear, path: SupportPath) -> int:
    """How many values the supports of a path have in this layer."""
    return sum(map(prod, layer.sizes(path).values()))


def _cross(one: SupportPath, other: SupportPath, chance: random.Random) -> SupportPath:
    return one.model_copy(update={key: getattr(chance.choice((one, other)), key) for key in _KEYS})


def within(layers: Sequence[GLoRALinear], paths: _Paths, most: int, chance: random.Random) -> _Paths:
    """The paths, with supports dropped at random until they have at most `most` values; one value at least.

    Those that were dropped before a larger one, and fit beside the rest, come back: the limit is there to be used.
    """
    chosen = list(paths)
    sizes = [count(layer, path) for layer, path in zip(layers, chosen, strict=True)]

    def put(number: int, key: str, form: str) -> None:
        chosen[number] = chosen[number].model_copy(update={key: form})
        sizes[number] = count(layers[number], chosen[number])

    gone: list[tuple[int, str, str]] = []
    while sum(sizes) > most:
        number = chance.choice([number for number, size in enumerate(sizes) if size])
        key = chance.choice([key for key in FORMS if getattr(chosen[number], key) != "none"])
        gone.append((number, key, getattr(chosen[number], key)))
        put(number, key, "none")
    for number, key, form in gone[::-1]:
        put(number, key, form)
        if sum(sizes) > most:
            put(number, key, "none")
    if not sum(sizes):
        put(0, "E", "scalar")
    return tuple(chosen)
