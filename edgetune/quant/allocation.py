"""How many bits each layer gets: an allocation as a value to print, and the best one within limits."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edgetune.core.allocate import Front, Option
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.numbers import MIB
from edgetune.core.widths import BitWidths, LayerWidth, MeasuredWidths

Width = Literal["int4-channel", "int4", "int8", "float"]
WIDTHS: tuple[Width, ...] = ("int4-channel", "int4", "int8", "float")
BYTES, MS = "size_mib", "latency_ms"  # the kinds of cost, by the settings that limit them


@dataclass(frozen=True)
class LayerBits:
    """The width of one layer."""

    layer: str
    is_table: bool
    width: Width
    weights: int  # how many values the layer's weight has
    size_bytes: int  # of the weight as stored, scales included
    loss: float  # predicted, of this layer alone; 0 in floating point
    ms: float = 0.0  # predicted; 0 without a device


@dataclass(frozen=True)
class MeasuredAllocation:
    """An allocation measured on held-out rows, all of its weights rounded to nearest."""

    name: str
    average_bits: float
    kl: float  # mean KL divergence from the floating-point model, in nats
    size_bytes: int  # of the whole model as stored


@dataclass(frozen=True)
class Allocation:
    """The width of every layer that it is about, in the model's order."""

    choices: tuple[LayerBits, ...]
    other_bytes: int = 0  # of all else in the model
    compared: tuple[MeasuredAllocation, ...] = ()
    held_out: bool = True  # whether they were compared on other batches than those of the calibration
    other_ms: float = 0.0  # predicted, of all else in the program; 0 without a device

    @property
    def latency_ms(self) -> float:
        """Predicted, of the program on the device; 0 without one."""
        return self.other_ms + sum(choice.ms for choice in self.choices)

    @property
    def size_bytes(self) -> int:
        """Of the whole model as stored."""
        return self.other_bytes + sum(choice.size_bytes for choice in self.choices)

    @property
    def average_bits(self) -> float:
        """Of a weight in these layers, scales included."""
        return average_bits(self.choices)

    def widths(self) -> dict[str, Width]:
        """The width of each layer by its name."""
        return {choice.layer: choice.width for choice in self.choices}

    def to_mapping(self) -> dict[str, Width]:
        """As a recipe takes it: the most frequent width for all, then the layers that have another."""
        if not self.choices:
            return {}
        common = Counter(choice.width for choice in self.choices).most_common(1)[0][0]
        return {"*": common} | {c.layer: c.width for c in self.choices if c.width != common}

    def summary(self) -> str:
        """One line: how many layers have each width, and what was compared."""
        counts = Counter(choice.width for choice in self.choices)
        widths = ", ".join(f"{counts[width]} in {width}" for width in WIDTHS if counts[width])
        text = f"{self.average_bits:.2f} bits on average: {widths}"
        if self.latency_ms:
            text += f"; {self.latency_ms:.3g} ms predicted"
        if self.compared:
            kls = ", ".join(f"{one.name} ({one.average_bits:.2f} bits) {one.kl:.2g}" for one in self.compared)
            batches = "held-out batches" if self.held_out else "the calibration batches, for want of others"
            text += f"; KL divergence on {batches}, weights rounded to nearest: {kls}"
        return text

    def to_bit_widths(self, loss: str) -> BitWidths:
        """As an entry of the ledger. `loss`: what the losses are, in words; "": the widths were written."""
        layers = (
            LayerWidth(
                layer=c.layer,
                width=c.width,
                bits=8 * c.size_bytes / c.weights if c.weights else None,
                share_pct=100 * c.size_bytes / self.size_bytes,
                loss=c.loss if loss else None,
            )
            for c in self.choices
        )
        measured = (
            MeasuredWidths(
                name=one.name, average_bits=one.average_bits, size_mib=one.size_bytes / MIB, kl_divergence=one.kl
            )
            for one in self.compared
        )
        return BitWidths(layers=tuple(layers), loss=loss, measured=tuple(measured), held_out=self.held_out)

    def __str__(self) -> str:
        lines = [f"allocation: {self.summary()}; {self.size_bytes / MIB:.2f} MiB in all"]
        size = max((len(choice.width) for choice in self.choices), default=0)
        for c in self.choices:
            ms = f", {c.ms:.3g} ms" if c.ms else ""
            lines.append(f"  {c.width:<{size}} {c.layer}: {c.size_bytes:,} bytes{ms}, loss {c.loss:.2g}")
        return "\n".join(lines)


Menu = Mapping[str, Sequence[LayerBits]]  # of each layer its possible choices, the smallest first


def average_bits(choices: Sequence[LayerBits]) -> float:
    """Stored bits of a weight, scales included; 0 without choices."""
    weights = sum(choice.weights for choice in choices)
    return 8 * sum(choice.size_bytes for choice in choices) / weights if weights else 0.0


def allocate(menu: Menu, limits: Mapping[str, float], beside: Mapping[str, float]) -> tuple[LayerBits, ...]:
    """The choices of the least sum of losses within the limits, by `core.allocate`.

    `limits` are of the whole model; `beside`: what it costs in addition to these layers.

    Raises `EdgetuneError` (exit code 4) with the least that can be reached where the limits cannot be met.
    """
    options = [[Option(c, -c.loss, {BYTES: c.size_bytes, MS: c.ms}) for c in choices] for choices in menu.values()]
    least = {kind: [min(option.costs[kind] for option in own) for own in options] for kind in limits}
    inside = {kind: limit - beside[kind] for kind, limit in limits.items()}
    front: Front[LayerBits] = Front(inside)
    for number, own in enumerate(options):
        left = {kind: limit - sum(least[kind][number + 1 :]) for kind, limit in inside.items()}
        front = front.plus(own, left)
    best = front.best(inside)
    if best is None:
        scale = {BYTES: MIB, MS: 1.0}
        raise EdgetuneError(
            "no allocation of bits stays within the limit" + "s" * (len(limits) > 1),
            got={kind: round(limit / scale[kind], 3) for kind, limit in limits.items()},
            allowed=[f"{kind} from {(beside[kind] + sum(least[kind])) / scale[kind]:.3f}" for kind in limits],
            action="raise the limit, or let skip name fewer layers",
            exit_code=Exit.BUDGET,
        )
    return tuple(option.name for option in best.name)


def allocate_uniformly(menu: Menu, limits: Mapping[str, float]) -> tuple[LayerBits, ...]:
    """Of one width for all linears and one for all tables, the pair of the least loss within the limits.

    Where no pair is within, the smallest.
    """
    pairs = [choose_widths(menu, linears, tables) for linears in WIDTHS for tables in WIDTHS]
    inside = [pair for pair in pairs if _within(pair, limits)]
    return min(inside, key=lambda pair: sum(choice.loss for choice in pair)) if inside else pairs[0]


def choose_widths(menu: Menu, linears: Width, tables: Width) -> tuple[LayerBits, ...]:
    """One width for all linears and one for all tables; a layer that it does not fit gets the next wider one."""
    return tuple(_at_least(choices, tables if choices[0].is_table else linears) for choices in menu.values())


def allocate_at_random(menu: Menu, limits: Mapping[str, float], seed: int) -> tuple[LayerBits, ...]:
    """Widen layers from the smallest width, in random order, as long as the limits are kept."""
    chosen = {name: choices[0] for name, choices in menu.items()}
    chance = random.Random(seed)
    steps = [choice for choices in menu.values() for choice in choices[1:]]
    chance.shuffle(steps)
    for choice in steps:
        wider = chosen | {choice.layer: choice}
        if choice.size_bytes > chosen[choice.layer].size_bytes and _within(tuple(wider.values()), limits):
            chosen = wider
    return tuple(chosen.values())


def _at_least(choices: Sequence[LayerBits], width: Width) -> LayerBits:
    return next((c for c in choices if WIDTHS.index(c.width) >= WIDTHS.index(width)), choices[-1])


def _within(choices: Sequence[LayerBits], limits: Mapping[str, float]) -> bool:
    sums = {BYTES: sum(choice.size_bytes for choice in choices), MS: sum(choice.ms for choice in choices)}
    return all(sums[kind] <= limit for kind, limit in limits.items())
