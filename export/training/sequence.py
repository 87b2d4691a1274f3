"""Order a training step's operators: each update as soon as its gradient is available.

A gradient is freed before backward continues, so that gradients never accumulate.
"""

from __future__ import annotations

import heapq
from typing import Any

from torch import fx

from edgetune.export.training.draft import Draft, reach
from edgetune.export.training.memory import backward_of, bytes_of
from edgetune.export.training.order import Unit, schedule_units
from edgetune.export.training.update import parameter_of


def order_operators(draft: Draft, updates: dict[str, fx.Node]) -> None:
    """Put the operators into the order that needs the least memory.

    An update comes after every other reader of its tensor, so that it can be written in place.
    """
    before = _prerequisites(draft, updates)
    units: dict[fx.Node, Unit] = {}
    for place, node in enumerate(advance_updates(draft, updates, before)):
        units[node] = Unit(place, dict.fromkeys(node.all_input_nodes), {node: None})
    for node, unit in units.items():
        unit.before = dict.fromkeys(units[other] for other in sorted(before[node], key=lambda n: units[n].place))
    sizes: dict[Any, int] = {node: 0 if node in updates.values() else bytes_of(node) for node in units}
    written = {unit: node for node, unit in units.items()}
    for unit in schedule_units(list(units.values()), sizes, set(draft.graph.output_node().all_input_nodes)):
        draft.graph.output_node().prepend(written[unit])


def advance_updates(draft: Draft, updates: dict[str, fx.Node], before: dict[fx.Node, set[fx.Node]]) -> list[fx.Node]:
    """The operators in written order, but those that only one update needs as early as possible.

    Operators that neither the results nor the chain of gradients need (a copied activation, a scaled momentum) come
    right before their first reader.
    """
    place = {node: n for n, node in enumerate(before)}
    backward = backward_of(draft)
    results = [n for n in draft.graph.output_node().all_input_nodes if n not in updates.values()]
    driving = backward | reach((n for n in results if n in before), before.__getitem__)
    first = _only_for_one_update(draft, updates) & backward
    waiting: dict[fx.Node, int] = {}
    followers: dict[fx.Node, list[fx.Node]] = {}
    for node in driving:
        needed = reach(before[node], lambda other: () if other in driving else before[other]) & driving
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


def _prerequisites(draft: Draft, updates: dict[str, fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """The operators that must run before each one: its sources, and for an update the other readers of its tensor."""
    required = {node: {s for s in node.all_input_nodes if s.op == "call_function"} for node in draft.nodes()}
    for target, update in updates.items():
        required[update] |= {user for user in draft.placeholder_of(target).users if user in required} - {update}
    return required


def _only_for_one_update(draft: Draft, updates: dict[str, fx.Node]) -> set[fx.Node]:
    """The operators needed only for the update of one parameter, with what the optimizer keeps for it."""
    parameters: dict[str, int] = {}
    leads: dict[fx.Node, int] = {}  # a bit for each parameter
    for target, update in updates.items():
        bit = parameters.setdefault(parameter_of(target), 1 << len(parameters))
        leads[update] = leads.get(update, 0) | bit
    results = [n for n in draft.graph.output_node().all_input_nodes if n not in updates.values()]
    leads |= dict.fromkeys(results, (1 << len(parameters) + 1) - 1)
    for node in reversed(draft.nodes()):
        for user in node.users:
            leads[node] = leads.get(node, 0) | leads.get(user, 0)
    return {node for node, bits in leads.items() if bits and not bits & (bits - 1)}


def _emit(
    node: fx.Node, before: dict[fx.Node, set[fx.Node]], place: dict[fx.Node, int], done: dict[fx.Node, None]
) -> None:
    """Append the node to `done`, after its missing prerequisites."""
    todo = [node]
    while todo:
        missing = sorted((n for n in before[todo[-1]] if n not in done), key=place.__getitem__, reverse=True)
        if missing:
            todo += missing
        else:
            done.setdefault(todo.pop())
