"""The search for a scheme by evolution, for costs that do not add up over layers."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from edgetune.sparse.auto.account import Profile, Updating
from edgetune.sparse.auto.search import Found, Limits, Task, Values
from edgetune.sparse.scheme import Part

Genome = tuple[int, ...]  # the number of each layer's option; 0 trains nothing, or what is fixed
Cost = Callable[[Mapping[str, Part]], tuple[float, float]]  # bytes and milliseconds of a scheme


def by_evolution(
    profile: Profile,
    values: Values,
    limits: Limits,
    *,
    fixed: Mapping[str, Part] | None = None,
    updating: Updating | None = None,
    cost: Cost | None = None,
    seed: int = 0,
    generations: int = 80,
    population: int = 32,
) -> Found:
    """A good scheme by evolution; the same for the same seed. Stops after so many generations, whatever was found.

    `cost` replaces the profile's own bytes and milliseconds, as for the peak of a step:
    `lambda parts: (profile.account(parts).peak_bytes, profile.step_ms(parts))`.

    Raises:
        EdgetuneError: (exit code 4) nothing that was found fits; it says the least that can be had.
    """
    task = Task(profile, values, fixed or {}, limits, updating or Updating())
    life = _Life(task, cost, random.Random(seed))
    living = [life.mended(life.first()) for _ in range(population)]
    for _ in range(generations):
        children = [life.mended(life.child(life.chosen(living), life.chosen(living))) for _ in range(population)]
        living = sorted({*living, *children}, key=life.fitness, reverse=True)[:population]
    best = max(living, key=life.fitness)
    if not life.fits(best) or not any(part != "frozen" for part in life.parts(best).values()):
        raise task.refuse()
    return task.found(life.parts(best), life.cost_of(best)[2])


class _Life:
    """What happens to genomes."""

    def __init__(self, task: Task, cost: Cost | None, chance: random.Random) -> None:
        self.task, self.cost, self.chance = task, cost, chance
        self.options = [task.options[layer.name] for layer in task.layers]
        self.known: dict[Genome, tuple[float, float, float]] = {}

    def parts(self, genome: Genome) -> dict[str, Part]:
        """The scheme that a genome stands for."""
        layers = self.task.layers
        return {layer.name: own[n].part for layer, own, n in zip(layers, self.options, genome, strict=True)}

    def cost_of(self, genome: Genome) -> tuple[float, float, float]:
        """Bytes, milliseconds and value."""
        if genome not in self.known:
            layers = self.task.layers
            chosen = {layer.name: own[n] for layer, own, n in zip(layers, self.options, genome, strict=True)}
            if self.cost is None:
                self.known[genome] = self.task.cost(chosen)
            else:
                value = sum(option.value for option in chosen.values())
                self.known[genome] = (*self.cost(self.parts(genome)), value)
        return self.known[genome]

    def excess(self, genome: Genome) -> float:
        """How far over the limits, as a part of them."""
        taken, ms, _ = self.cost_of(genome)
        limits = self.task.limits
        over = max(0.0, taken / max(limits.bytes, 1e-9) - 1)
        return over + (0.0 if limits.step_ms is None else max(0.0, ms / max(limits.step_ms, 1e-9) - 1))

    def fits(self, genome: Genome) -> bool:
        """Whether it stays within the limits."""
        return self.excess(genome) <= 0

    def fitness(self, genome: Genome) -> tuple[float, float, float, Genome]:
        """What is better is larger; the genome itself decides between equals, so that no order is left to chance."""
        taken, _, value = self.cost_of(genome)
        excess = self.excess(genome)
        return (-excess, 0.0 if excess else value, -taken, genome)

    def first(self) -> Genome:
        """Nothing before a layer drawn at random trains; after it, whatever is drawn."""
        start, much = self.chance.choice(self.task.starts or [0]), self.chance.random()
        return tuple(
            self.chance.randrange(len(own)) if layer.start >= start and self.chance.random() < much else 0
            for layer, own in zip(self.task.layers, self.options, strict=True)
        )

    def chosen(self, living: list[Genome]) -> Genome:
        """The best of three."""
        return max(self.chance.sample(living, min(3, len(living))), key=self.fitness)

    def child(self, one: Genome, other: Genome) -> Genome:
        """Of both parents, then changed in a few places."""
        if self.chance.random() < 0.5:
            genes = [self.chance.choice(pair) for pair in zip(one, other, strict=True)]
        else:
            cut = self.chance.randrange(len(one) + 1)
            genes = [*one[:cut], *other[cut:]]
        for _ in range(self.chance.choice((1, 1, 2, 3))):
            place = self.chance.randrange(len(genes))
            genes[place] = self.chance.randrange(len(self.options[place]))
        if self.chance.random() < 0.3:  # the start decides most: move it
            start = self.chance.choice(self.task.starts or [0])
            genes = [0 if layer.start < start else gene for layer, gene in zip(self.task.layers, genes, strict=True)]
        return tuple(genes)

    def mended(self, genome: Genome) -> Genome:
        """Less, layer by layer, until it fits; then more where it goes on to fit. Each layer is looked at once."""
        places = list(range(len(genome)))
        self.chance.shuffle(places)
        genes = list(genome)
        for place in places:
            if self.fits(tuple(genes)):
                break
            genes[place] = 0
        self.chance.shuffle(places)
        for place in places[:6]:
            now = self.options[place][genes[place]].value
            better = [n for n, option in enumerate(self.options[place]) if option.value > now]
            if better:
                tried = [*genes[:place], self.chance.choice(better), *genes[place + 1 :]]
                genes = tried if self.fits(tuple(tried)) else genes
        return tuple(genes)
