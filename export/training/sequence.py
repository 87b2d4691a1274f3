"""The order of a training step's operators: each update as soon as its gradient can be made, what it needs when asked.

A gradient is made, used and gone before backward goes on, so that gradients never pile up.
"""

from __future__ import annotations

import heapq
from typing import Any

from torch import fx

from edgetune.export.training.draft import Draft
from edgetune.export.training.memory import backward_of, bytes_of
from edgetune.export.training.order import Unit, smallest
from edgetune.export.training.update import MOMENTUM


def order(draft: Draft, updates: dict[str, fx.Node]) -> None:
    """Put the operators into the order that keeps the least alive.

    An update comes after every other reader of its tensor, so that it can be written where it lies, and takes no room.
    """
    before = _before(draft, updates)
    units: dict[fx.Node, Unit] = {}
    for place, node in enumerate(early(draft, updates, before)):
        units[node] = Unit(place, dict.fromkeys(node.all_input_nodes), {node: None})
    for node, unit in units.items():
        unit.before = dict.fromkeys(units[other] for other in sorted(before[node], key=lambda n: units[n].place))
    sizes: dict[Any, int] = {node: 0 if node in updates.values() else bytes_of(node) for node in units}
    written = {unit: node for node, unit in units.items()}
    for unit in smallest(list(units.values()), sizes, set(draft.graph.output_node().all_input_nodes)):
        draft.graph.output_node().prepend(written[unit])


def early(draft: Draft, updates: dict[str, fx.Node], before: dict[fx.Node, set[fx.Node]]) -> list[fx.Node]:
    """The operators as written, but what leads to one update only comes as soon as it can.

    What neither the results nor backward's way down need by themselves (a copy of an activation, the momentum that is
    scaled) comes right before its first reader.
    """
    place = {node: n for n, node in enumerate(before)}
    backward = backward_of(draft)
    results = [n for n in draft.graph.output_node().all_input_nodes if n not in updates.values()]
    driving = backward | _behind(results, before)
    first = _leading_to_one(draft, updates) & backward
    waiting: dict[fx.Node, int] = {}
    followers: dict[fx.Node, list[fx.Node]] = {}
    for node in driving:
        needed = _nearest(node, driving, before)
        waiting[node] = len(needed)
        for other in needed:
            followers.setdefault(other, []).append(node)
    nodes = list(place)
    ready = [(node not in first, place[node]) for node in driving if not waiting[node]]
    heapq.heapify(ready)
    done: dict[fx.Node, None] = {}
    while ready:
        node = nodes[heapq.heappop(ready)[1]]
        _emit(node, before, place, done)
        for follower in followers.get(node, ()):
            waiting[follower] -= 1
            if not waiting[follower]:
                heapq.heappush(ready, (follower not in first, place[follower]))
    return [*done, *(node for node in nodes if node not in done)]


def _before(draft: Draft, updates: dict[str, fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """What must have run before each operator: its sources, and before an update the other readers of its tensor."""
    found = {node: {s for s in node.all_input_nodes if s.op == "call_function"} for node in draft.nodes()}
    for target, update in updates.items():
        found[update] |= {user for user in draft.holder(target).users if user in found} - {update}
    return found


def _behind(nodes: list[fx.Node], before: dict[fx.Node, set[fx.Node]]) -> set[fx.Node]:
    """The operators among the nodes and all that they need."""
    found: set[fx.Node] = set()
    todo = [node for node in nodes if node in before]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += before[node]
    return found


def _leading_to_one(draft: Draft, updates: dict[str, fx.Node]) -> set[fx.Node]:
    """What is needed for the update of one parameter, or of its momentum, and for nothing else."""
    parameters: dict[str, int] = {}
    leads: dict[fx.Node, int] = {}  # a bit for each parameter
    for target, update in updates.items():
        bit = parameters.setdefault(target.removesuffix(MOMENTUM), 1 << len(parameters))
        leads[update] = leads.get(update, 0) | bit
    results = [n for n in draft.graph.output_node().all_input_nodes if n not in updates.values()]
    leads |= dict.fromkeys(results, (1 << len(parameters) + 1) - 1)
    for node in reversed(draft.nodes()):
        for user in node.users:
            leads[node] = leads.get(node, 0) | leads.get(user, 0)
    return {node for node, bits in leads.items() if bits and not bits & (bits - 1)}


def _nearest(node: fx.Node, driving: set[fx.Node], before: dict[fx.Node, set[fx.Node]]) -> set[fx.Node]:
    """The driving operators that a node needs, directly or through others."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    todo = list(before[node])
    while todo:
        other = todo.pop()
        if other in seen:
            continue
        seen.add(other)
        if other in driving:
            found.add(other)
        else:
            todo += before[other]
    return found


def _emit(
    node: fx.Node, before: dict[fx.Node, set[fx.Node]], place: dict[fx.Node, int], done: dict[fx.Node, None]
) -> None:
    """Append the node to what is done, behind everything it needs that is not."""
    todo = [node]
    while todo:
        missing = sorted((n for n in before[todo[-1]] if n not in done), key=place.__getitem__, reverse=True)
        if missing:
            todo += missing
        else:
            done.setdefault(todo.pop())
