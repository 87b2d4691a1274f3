"""Schedule operators so that they need the least memory, and place their tensors in an arena."""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Unit:
    """One step of a program; tensors are keys.

    The dicts have no values: they are sets that keep their order, so that two processes plan alike.
    """

    place: int  # in the written order
    reads: dict[Hashable, None] = field(default_factory=dict)
    writes: dict[Hashable, None] = field(default_factory=dict)
    before: dict[Unit, None] = field(default_factory=dict)  # what must have run before it


def schedule_units(units: Sequence[Unit], sizes: dict[Hashable, int], kept: set[Hashable]) -> list[Unit]:
    """The units in the order with the smallest arena of those tried. `kept` tensors live to the end."""
    tried = [list(units), *(_schedule(units, sizes, kept, eager=eager) for eager in (True, False))]
    return min(tried, key=lambda order: plan_arena(order, sizes, kept)[0])


def _schedule(units: Sequence[Unit], sizes: dict[Hashable, int], kept: set[Hashable], *, eager: bool) -> list[Unit]:
    """List scheduling: of the units that can run, take the one that leaves the least memory alive.

    With `eager`, only a unit that frees memory is preferred; otherwise the written order holds.
    """
    readers: dict[Hashable, int] = {}
    for unit in units:
        for key in unit.reads:
            readers[key] = readers.get(key, 0) + 1
    followers: dict[Unit, list[Unit]] = {unit: [] for unit in units}
    for unit in units:
        for other in unit.before:
            followers[other].append(unit)
    waiting = {unit: len(unit.before) for unit in units}
    ready = sorted((u for u in units if not waiting[u]), key=lambda u: u.place)
    done: list[Unit] = []

    def growth(unit: Unit) -> int:
        freed = sum(sizes.get(k, 0) for k in unit.reads if readers[k] == 1 and k not in kept and k not in unit.writes)
        return sum(sizes.get(k, 0) for k in unit.writes if k not in unit.reads) - freed

    while ready:
        grown = [growth(unit) for unit in ready]
        at = min(range(len(ready)), key=lambda i: (min(grown[i], 0) if eager else grown[i], ready[i].place))
        unit = ready.pop(at)
        done.append(unit)
        for key in unit.reads:
            readers[key] -= 1
        for follower in followers[unit]:
            waiting[follower] -= 1
            if not waiting[follower]:
                bisect.insort(ready, follower, key=lambda u: u.place)
    return done


def lifetimes_of(order: Sequence[Unit], kept: set[Hashable]) -> dict[Hashable, tuple[int, int]]:
    """First and last step of each tensor. A tensor that no unit writes is alive from the start."""
    spans: dict[Hashable, tuple[int, int]] = {}
    for step, unit in enumerate(order):
        for key in unit.writes:
            spans[key] = (spans.get(key, (step, step))[0], step)
        for key in unit.reads:
            spans[key] = (spans.get(key, (0, step))[0], step)
    return {key: (start, len(order) if key in kept else stop) for key, (start, stop) in spans.items()}


def plan_arena(
    order: Sequence[Unit], sizes: dict[Hashable, int], kept: set[Hashable], alignment: int = 16
) -> tuple[int, dict[Hashable, int]]:
    """Bytes of the arena, and the offset of each tensor."""
    spans = lifetimes_of(order, kept)
    return place_tensors({k: (sizes[k], *span) for k, span in spans.items() if sizes.get(k)}, alignment)


def place_tensors(
    tensors: dict[Hashable, tuple[int, int, int]], alignment: int = 16
) -> tuple[int, dict[Hashable, int]]:
    """Arena bytes and offsets for tensors `(bytes, first, last)`: the largest first, each in the tightest gap.

    Greedy by size after Pisarchyk and Lee, "Efficient memory management for deep neural net inference" (2020).
    """
    offsets: dict[Hashable, int] = {}
    laid: list[tuple[int, int, int, int]] = []  # offset, end, first, last
    total = 0
    for key, (size, first, last) in sorted(tensors.items(), key=lambda item: (-item[1][0], item[1][1])):
        size = -(-size // alignment) * alignment
        at = best = 0
        room: int | None = None
        for offset, end, start, stop in laid:
            if stop < first or start > last:
                continue
            gap = offset - at
            if gap >= size and (room is None or gap < room):
                best, room = at, gap
            at = max(at, end)
        at = at if room is None else best
        offsets[key] = at
        bisect.insort(laid, (at, at + size, first, last))
        total = max(total, at + size)
    return total, offsets
