"""Where delegates are cut, so that a training step needs the smallest arena.

A delegate has all its inputs and makes all its outputs at once. One delegate for a whole backward pass would hold
every gradient and every saved activation together; cut into stretches of the order in which the operators were
written, each holds what its stretch reads and gives, and what lies between is gone.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from edgetune.export.training.memory import bytes_of
from edgetune.export.training.order import Unit, planned, smallest

_SPARE = 1.01  # of the smallest arena is allowed for fewer delegates
_LONGEST = 400  # places for a cut that are looked at behind another


@dataclass(frozen=True)
class Span:
    """A tensor of the arena: the operator that makes it (-1: an input) and the last one that reads it."""

    size_bytes: int
    first: int
    last: int
    inside: bool  # a stretch in which it begins and ends need not hold it


def partitioner(configs: Sequence[type]) -> Any:
    """XNNPACK's partitioner with these configurations, whose partitions are cut into stretches."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from torch.fx.passes.infra.partitioner import Partition

    class Cutting(XnnpackPartitioner):  # type: ignore[misc]
        def generate_partitions(self, ep: ExportedProgram) -> list[Any]:
            whole = [list(partition.nodes) for partition in super().generate_partitions(ep)]
            places = {n: p for p, n in enumerate(n for n in ep.graph.nodes if n.op == "call_function")}
            together = [[places[n] for n in group if n in places] for group in self.get_matched_nodes_from_configs(ep)]
            pieces = _smallest(ep, whole, places, stretches(ep, whole, together))
            return [Partition(id=n, nodes=dict.fromkeys(piece)) for n, piece in enumerate(pieces)]

    return Cutting(configs=list(configs))


def _smallest(
    program: ExportedProgram, whole: list[list[fx.Node]], places: dict[fx.Node, int], ends: list[int]
) -> list[list[fx.Node]]:
    """The partitions, cut where that makes the arena smaller: every cut is tried without."""
    best = _cut(whole, places, ends)
    least = arena_bytes(program, best)
    for end in ends[:-1]:
        without = [other for other in ends if other != end]
        tried = _cut(whole, places, without)
        size = arena_bytes(program, tried)
        if size <= least:
            ends, best, least = without, tried, size
    return best if least < arena_bytes(program, whole) else whole


def _cut(whole: list[list[fx.Node]], places: dict[fx.Node, int], ends: list[int]) -> list[list[fx.Node]]:
    pieces: dict[tuple[int, int], list[fx.Node]] = {}
    for n, nodes in enumerate(whole):
        mates = set(nodes)
        for node in nodes:
            pieces.setdefault((n, _stretch(node, mates, places, ends)), []).append(node)
    return list(pieces.values())


def _stretch(node: fx.Node, mates: Any, places: dict[fx.Node, int], ends: Sequence[int]) -> int:
    """The number of the stretch that a node lies in; a constant goes where its first reader is."""
    at = places[node] if node in places else min(places[user] for user in node.users if user in mates)
    return bisect.bisect_right(ends, at)


def stretches(program: ExportedProgram, partitions: Sequence[Sequence[fx.Node]], together: Any) -> list[int]:
    """Where each stretch ends: the place of the first operator behind it, in order."""
    spans, count = tensors(program, partitions)
    allowed = [True] * (count + 1)
    for group in together:
        for place in range(min(group, default=0) + 1, max(group, default=0) + 1):
            allowed[place] = False  # such operators stay in one delegate
    return cuts(spans, count, allowed)


def tensors(program: ExportedProgram, partitions: Sequence[Sequence[fx.Node]]) -> tuple[list[Span], int]:
    """What the arena holds of a program, by the places of its operators, and how many these are."""
    signature = program.graph_signature
    delegated = {node: n for n, nodes in enumerate(partitions) for node in nodes}
    operators = [node for node in program.graph.nodes if node.op == "call_function"]
    places: dict[fx.Node, int] = {node: place for place, node in enumerate(operators)}
    returned = set(program.graph.output_node().all_input_nodes)
    found = []
    for node in [n for n in program.graph.nodes if n.op == "placeholder"] + operators:
        if node.op == "placeholder" and node.name not in signature.user_inputs:
            continue  # constants and state are held elsewhere
        if node.name in signature.buffers_to_mutate:
            continue  # written where the state lies
        readers = [places[user] for user in node.users if user in places]
        last = len(operators) if node in returned else max(readers, default=places.get(node, 0))
        inside = node in delegated and all(delegated.get(user) == delegated[node] for user in node.users)
        found.append(Span(bytes_of(node), places.get(node, -1), last, inside))
    return [span for span in found if span.size_bytes], len(operators)


def arena_bytes(program: ExportedProgram, partitions: Sequence[Sequence[fx.Node]]) -> int:
    """The arena of a program whose delegates are these partitions, as the plan will find it, but for the state."""
    signature = program.graph_signature
    owner: dict[fx.Node, Unit] = {}
    for n, nodes in enumerate(partitions):
        owner |= dict.fromkeys(nodes, Unit(n))
    operators = [node for node in program.graph.nodes if node.op == "call_function"]
    for place, node in enumerate(operators):
        unit = owner.setdefault(node, Unit(place))
        unit.place = place
        for source in node.all_input_nodes:
            if owner.get(source) is not unit:
                unit.reads[source] = None
                if source in owner and source.op == "call_function":
                    unit.before[owner[source]] = None
    returned = set(program.graph.output_node().all_input_nodes)
    for node in operators:
        if node in returned or any(owner.get(user) is not owner[node] for user in node.users):
            owner[node].writes[node] = None
    inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in signature.user_inputs]
    sizes: dict[Any, int] = {n: bytes_of(n) for n in [*inputs, *operators] if n.name not in signature.buffers_to_mutate}
    units = {owner[node]: owner[node].before for node in operators}
    order = list(TopologicalSorter(units).static_order())
    return planned(smallest(order, sizes, set(returned)), sizes, set(returned))[0]


def cuts(spans: Sequence[Span], count: int, allowed: Sequence[bool]) -> list[int]:
    """The ends of the stretches that need the least at once; of those within a hundredth of it, the fewest."""
    at = _candidates(spans, count, allowed)
    rows = list(_held(spans, at))
    best = [0] + [2**62] * (len(at) - 1)
    for i, row in enumerate(rows):
        for n, held in enumerate(row):
            best[i + 1 + n] = min(best[i + 1 + n], max(best[i], held))
    limit = best[-1] * _SPARE
    fewest, back = [0] + [len(at)] * (len(at) - 1), [0] * len(at)
    for i, row in enumerate(rows):
        for n, held in enumerate(row):
            if held <= limit and fewest[i] + 1 < fewest[i + 1 + n]:
                fewest[i + 1 + n], back[i + 1 + n] = fewest[i] + 1, i
    ends, place = [], len(at) - 1
    while place:
        ends.append(at[place])
        place = back[place]
    return ends[::-1]


def _candidates(spans: Sequence[Span], count: int, allowed: Sequence[bool]) -> list[int]:
    """Places where no less would be alive one operator before or after."""
    alive = [0] * (count + 2)
    for span in spans:
        alive[span.first + 1] += span.size_bytes
        alive[min(span.last, count) + 1] -= span.size_bytes
    for place in range(1, count + 1):
        alive[place] += alive[place - 1]
    free = [place for place in range(1, count) if allowed[place]]
    low = [
        place
        for before, place, after in zip([0, *free], free, [*free[1:], count], strict=False)
        if alive[place] < alive[before] or alive[place] <= alive[after]
    ]
    return [0, *low, count]


def _held(spans: Sequence[Span], at: Sequence[int]) -> Any:
    """For each candidate `i`, the bytes that a stretch from there to each later one holds."""
    begun: list[list[Span]] = [[] for _ in range(at[-1])]
    ended: list[list[Span]] = [[] for _ in range(at[-1])]
    for span in spans:
        if span.first >= 0:
            begun[span.first].append(span)
        if span.inside and span.last < at[-1] and span.first >= 0:
            ended[span.last].append(span)
    for i, start in enumerate(at[:-1]):
        held = sum(s.size_bytes for s in spans if s.first < start <= s.last)
        row = []
        place = start
        for end in at[i + 1 : i + 1 + _LONGEST]:
            while place < end:
                held += sum(s.size_bytes for s in begun[place])
                held -= sum(s.size_bytes for s in ended[place] if s.first >= start)
                place += 1
            row.append(held)
        yield row
