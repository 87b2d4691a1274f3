"""Cut delegates into segments, so that a training step needs the smallest arena.

A delegate's inputs and outputs are alive together. One delegate for the whole backward pass would hold every gradient
and every saved activation at once; a segment of consecutive operators only holds what it reads and writes.
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
from edgetune.export.training.order import Unit, plan_arena, schedule_units

_SLACK = 1.01  # how much larger than the smallest arena it may be for fewer delegates
_LONGEST = 400  # candidates that one segment may span


@dataclass(frozen=True)
class Span:
    """A tensor of the arena: the operator that writes it (-1: an input) and the last one that reads it."""

    size_bytes: int
    first: int
    last: int
    inside: bool  # not needed in the arena by a segment that contains all its uses


def cutting_partitioner(configs: Sequence[type]) -> Any:
    """XNNPACK's partitioner with these configurations, with its partitions cut into segments."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from torch.fx.passes.infra.partitioner import Partition

    class Cutting(XnnpackPartitioner):  # type: ignore[misc]
        def generate_partitions(self, ep: ExportedProgram) -> list[Any]:
            whole = [list(partition.nodes) for partition in super().generate_partitions(ep)]
            positions = {n: p for p, n in enumerate(n for n in ep.graph.nodes if n.op == "call_function")}
            together = [
                [positions[n] for n in group if n in positions] for group in self.get_matched_nodes_from_configs(ep)
            ]
            pieces = _merge_segments(ep, whole, positions, find_cuts(ep, whole, together))
            return [Partition(id=n, nodes=dict.fromkeys(piece)) for n, piece in enumerate(pieces)]

    return Cutting(configs=list(configs))


def _merge_segments(
    program: ExportedProgram, whole: list[list[fx.Node]], positions: dict[fx.Node, int], ends: list[int]
) -> list[list[fx.Node]]:
    """The partitions with the cuts that make the arena smaller; each cut is also tried without."""
    best = _split_partitions(whole, positions, ends)
    least = arena_bytes(program, best)
    for end in ends[:-1]:
        without = [other for other in ends if other != end]
        tried = _split_partitions(whole, positions, without)
        size = arena_bytes(program, tried)
        if size <= least:
            ends, best, least = without, tried, size
    return best if least < arena_bytes(program, whole) else whole


def _split_partitions(
    whole: list[list[fx.Node]], positions: dict[fx.Node, int], ends: list[int]
) -> list[list[fx.Node]]:
    pieces: dict[tuple[int, int], list[fx.Node]] = {}
    for n, nodes in enumerate(whole):
        mates = set(nodes)
        for node in nodes:  # a constant belongs to its first reader
            readers = [node] if node in positions else [user for user in node.users if user in mates]
            segment = bisect.bisect_right(ends, min(map(positions.__getitem__, readers)))
            pieces.setdefault((n, segment), []).append(node)
    return list(pieces.values())


def find_cuts(program: ExportedProgram, partitions: Sequence[Sequence[fx.Node]], together: Any) -> list[int]:
    """The end of each segment: the position of the first operator after it."""
    spans, count = arena_tensors(program, partitions)
    allowed = [True] * (count + 1)
    for group in together:
        for place in range(min(group, default=0) + 1, max(group, default=0) + 1):
            allowed[place] = False  # these operators must stay in one delegate
    return choose_cuts(spans, count, allowed)


def arena_tensors(program: ExportedProgram, partitions: Sequence[Sequence[fx.Node]]) -> tuple[list[Span], int]:
    """The tensors of a program's arena, by the positions of its operators, and the number of operators."""
    signature = program.graph_signature
    delegated = {node: n for n, nodes in enumerate(partitions) for node in nodes}
    operators = [node for node in program.graph.nodes if node.op == "call_function"]
    positions: dict[fx.Node, int] = {node: place for place, node in enumerate(operators)}
    returned = set(program.graph.output_node().all_input_nodes)
    spans = []
    for node in [n for n in program.graph.nodes if n.op == "placeholder"] + operators:
        if node.op == "placeholder" and node.name not in signature.user_inputs:
            continue  # constants and state are not in the arena
        if node.name in signature.buffers_to_mutate:
            continue  # written in place into the state
        readers = [positions[user] for user in node.users if user in positions]
        last = len(operators) if node in returned else max(readers, default=positions.get(node, 0))
        inside = node in delegated and all(delegated.get(user) == delegated[node] for user in node.users)
        spans.append(Span(bytes_of(node), positions.get(node, -1), last, inside))
    return [span for span in spans if span.size_bytes], len(operators)


def arena_bytes(program: ExportedProgram, partitions: Sequence[Sequence[fx.Node]]) -> int:
    """The arena bytes of a program with these partitions as delegates, without the state."""
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
    return plan_arena(schedule_units(order, sizes, set(returned)), sizes, set(returned))[0]


def choose_cuts(spans: Sequence[Span], count: int, allowed: Sequence[bool]) -> list[int]:
    """The ends of the segments with the least memory; of those within 1 % of it, the fewest."""
    at = _candidates(spans, count, allowed)
    rows = list(_segment_bytes(spans, at))
    best = [0] + [2**62] * (len(at) - 1)
    for i, row in enumerate(rows):
        for n, held in enumerate(row):
            best[i + 1 + n] = min(best[i + 1 + n], max(best[i], held))
    limit = best[-1] * _SLACK
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
    """Positions with a local minimum of memory alive."""
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


def _segment_bytes(spans: Sequence[Span], at: Sequence[int]) -> Any:
    """For each candidate `i`, the bytes that a segment from there to each later one holds."""
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
