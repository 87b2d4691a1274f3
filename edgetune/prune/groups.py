"""Find the groups of layers that must be cut together, as values to print and then act on.

The dependencies are read from torch-pruning's graph; its own `group.prune` and pruners are not used.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

from torch import nn

from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.inputs import Inputs, first_rows
from edgetune.core.layers import matches
from edgetune.prune.attention import (
    Attention,
    Units,
    attention_names,
    block_of,
    describe,
    display_name,
    find_projections,
    skip_action,
    spans,
)
from edgetune.prune.layers import Axis, cannot_cut, is_candidate, is_depthwise, is_linear, width_of
from edgetune.prune.probe import units_agree
from edgetune.prune.trace import trace

Kind = Literal["ffn", "heads", "channels"]


@dataclass(frozen=True)
class Member:
    """One layer along one axis. `of_unit[u]`: the positions on that axis that belong to unit `u`."""

    layer: str
    axis: Axis
    of_unit: tuple[tuple[int, ...], ...]

    @property
    def width(self) -> int:
        """Positions on the axis."""
        return sum(len(positions) for positions in self.of_unit)


@dataclass(frozen=True)
class Group:
    """Layers that can only be cut together, and the `units` they share: hidden units, channels, or heads.

    For attention a unit is one key-value head with the query heads that read it.
    """

    kind: Kind
    name: str
    units: int
    members: tuple[Member, ...]
    attention: Attention | None = None

    def along(self, axis: Axis) -> tuple[Member, ...]:
        """The members on one axis: "out" writes the units, "in" reads them."""
        return tuple(member for member in self.members if member.axis == axis)

    def __str__(self) -> str:
        layers = ", ".join(f"{m.layer} ({m.axis} {m.width})" for m in self.members)
        return f"{self.kind} {self.name}: {self.units} units in {layers}"


@dataclass(frozen=True)
class Cut:
    """A group and the units to take out of it."""

    group: Group
    drop: tuple[int, ...]

    @property
    def keep(self) -> tuple[int, ...]:
        """The units that stay, in order."""
        gone = set(self.drop)
        return tuple(unit for unit in range(self.group.units) if unit not in gone)

    def __str__(self) -> str:
        return f"{self.group.kind} {self.group.name}: {self.group.units} -> {len(self.keep)}"


def find_groups(model: nn.Module, inputs: Inputs, kinds: AbstractSet[str], skip: Collection[str]) -> list[Group]:
    """The groups of these kinds, in the model's order, without those that touch its output or a layer in `skip`.

    Raises `EdgetuneError` if the graph cannot be traced, for a wanted group that cannot be followed, and for a kind
    without a group, naming every layer seen and why it was left out.
    """
    finder = _Finder(model, inputs, kinds, skip)
    groups = finder.groups()
    for kind in sorted(kinds):
        if not any(group.kind == kind for group in groups):
            finder.refuse(kind)
    return groups


class _Finder:
    """The traced graph of one model, read once."""

    def __init__(self, model: nn.Module, inputs: Inputs, kinds: AbstractSet[str], skip: Collection[str]) -> None:
        self.model, self.inputs, self.kinds, self.skip = model, first_rows(inputs), kinds, skip
        self.names = {module: name for name, module in model.named_modules()}
        self.traced = trace(model, self.inputs)
        self.graph = self.traced.graph
        self.attentions = attention_names(model)
        self.blocked: dict[str, str] = {}  # layers whose group cannot be followed, and why
        self.left_out: dict[str, str] = {}  # layers seen that lead to no group, and why
        # FFNs are identified by the attention in their block, even one that cannot be cut
        beside = self.attentions or (_attention_modules(model) if "ffn" in kinds else [])
        self.blocks = [block_of(model, name) + "." for name in beside]
        self.inner = tuple(name + "." for name in beside if name in _attention_modules(model))
        self.projections = {
            (f"{name}.{child}" if name else child)
            for name in self.attentions
            for child in find_projections(model.get_submodule(name)) or ()
        }

    def groups(self) -> list[Group]:
        """Heads, then what the graph couples elsewhere; sorted by the model's own order."""
        groups = []
        if "heads" in self.kinds:
            groups = [_group_of_attention(a) for name in self.attentions if (a := self.attention(name)) is not None]
        if self.kinds & {"ffn", "channels"}:
            groups += self.coupled_groups()
        order = {name: index for index, name in enumerate(self.names.values())}
        return sorted(groups, key=lambda group: (order[group.name], group.kind))

    def attention(self, name: str) -> Attention | None:
        """One attention, unless it is skipped. Raises if its heads cannot be followed."""
        layers = [
            f"{name}.{child}" if name else child for child in find_projections(self.model.get_submodule(name)) or ()
        ]
        if self.is_skipped([name]) or (layers and self.is_skipped(layers)):
            self.left_out[name] = "in skip"
            return None
        for layer in layers:
            module = self.model.get_submodule(layer)
            if module not in self.graph.module2node:
                raise EdgetuneError(
                    f"the heads of {display_name(name)} cannot be pruned: {layer} ({self.traced.why_absent(module)})",
                    got=type(self.model.get_submodule(name)).__name__,
                    action=skip_action(name),
                )
        attention = describe(self.model, name, self.readers, self.units_agree)
        if self.is_skipped([*attention.writers, attention.output]):
            self.left_out[name] = "in skip"
            return None
        return attention

    def units_agree(self, writer: str, reader: str, outputs: Units, inputs: Units) -> bool:
        """Whether the units at these positions of a writer and a reader are independent of one another."""
        return units_agree(
            self.model, self.inputs, writer, reader, _unit_of_position(outputs), _unit_of_position(inputs)
        )

    def is_skipped(self, layers: Collection[str]) -> bool:
        """Whether a skip pattern matches one of the layers or a module around them."""
        paths = {layer.rsplit(".", cut)[0] for layer in layers for cut in range(layer.count(".") + 1)}
        return any(matches(path, self.skip) for path in paths)

    def readers(self, layer: str) -> list[str]:
        """The first linears downstream of a layer."""
        waiting, seen, readers = [self.graph.module2node[self.model.get_submodule(layer)]], set(), []
        while waiting:
            for node in waiting.pop().outputs:
                if node in seen:
                    continue
                seen.add(node)
                if node.module in self.names and is_linear(node.module):
                    readers.append(self.names[node.module])
                else:
                    waiting.append(node)
        return readers

    def coupled_groups(self) -> list[Group]:
        """The FFN and channel groups. Query, key and value layers are never a root: grouped heads do not end there."""
        groups: list[Group] = []
        done: set[str] = set()
        for name in self.raw_experts():
            self.left_out[name] = "experts whose weights are raw parameters"
            if "ffn" in self.kinds and not self.is_skipped([name]):
                self.blocked[name] = self.left_out[name]
        for layer, name in self.names.items():
            if name in done or not is_candidate(layer):
                continue
            if name in self.projections:
                self.left_out[name] = "writes queries, keys or values: those are heads"
                continue
            if layer not in self.graph.module2node:
                self.leave_absent(name)
                continue
            members, obstacles = self.members_of(layer)
            done |= {member.layer for member in members if member.axis == "out"}
            group = self.group(name, members, obstacles)
            if group is not None:
                groups.append(group)
        if self.blocked:
            self.raise_blocked()
        return groups

    def raw_experts(self) -> list[str]:
        """Modules that hold the FFNs of several experts as one parameter `(expert, ..., ...)`."""
        raw = (name for name, p in self.model.named_parameters() if p.dim() == 3 and "expert" in name.lower())
        holders = (name.rpartition(".")[0] for name in raw)
        return list(dict.fromkeys(n for n in holders if not is_candidate(self.model.get_submodule(n))))

    def leave_absent(self, name: str) -> None:
        """Leave out a layer outside the graph, unless the output depends on it: that would be less than was asked."""
        reason = self.traced.why_absent(self.model.get_submodule(name))
        self.left_out[name] = reason
        raw = isinstance(self.model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
        if (
            "output" not in reason.split()
            and not raw
            and self.kind_of([name]) in self.kinds
            and not self.is_skipped([name])
        ):
            self.blocked[name] = reason

    def raise_blocked(self) -> None:
        """Raise for the groups that were asked for and cannot be followed."""
        reasons = (f"{name} ({reason})" for name, reason in self.blocked.items())
        raise EdgetuneError(
            f"these layers' widths cannot be cut: {truncate_list(reasons)}",
            action=f"leave them out: skip: {list(self.blocked)}",
        )

    def refuse(self, kind: str) -> None:
        """Raise for a kind that has no group, with what was seen."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(name)
        seen = "; ".join(f"{truncate_list(names, 4)} ({reason})" for reason, names in by_reason.items())
        if kind == "heads" and not self.attentions:
            seen = truncate_list(_attention_modules(self.model), 4)
            seen = seen and f"{seen} (no linears of its own called as those of an attention are)"
        raise EdgetuneError(
            f"nothing to prune: no layer can be cut as {kind}; seen: {seen}"
            if seen
            else f"nothing to prune: the model has no {kind}",
            got=sorted(self.kinds),
            action="change what, or shorten skip",
        )

    def members_of(self, layer: nn.Module) -> tuple[list[Member], list[str]]:
        """The members that follow a cut of all outputs of `layer`, and in words what cannot be followed."""
        width = width_of(layer, "out")
        try:
            dependents = self.traced.dependents(layer)
        except (AttributeError, LookupError, TypeError, ArithmeticError, AssertionError) as error:
            reason = f"a rearrangement of its outputs ({type(error).__name__} while following them)"
            return [Member(self.names[layer], "out", _one_per_unit(width))], [reason]
        members: list[Member] = []
        obstacles: list[str] = []
        lost: dict[tuple[str, Axis], None] = {}  # members whose positions the graph does not give rightly
        for one in dependents:
            target = one.module
            if target not in self.names:
                if isinstance(target, nn.Parameter):
                    obstacles.append(f"the parameter {one.name}")
                elif one.ends:
                    obstacles.append("output")
                continue
            name = self.names[target]
            one_axis = not is_candidate(target) or is_depthwise(target)
            axis: Axis = "out" if one_axis or (one.writes and not one.reads) else "in"
            if axis == "out" and one.ends:
                obstacles.append("output")
            reason = cannot_cut(target, axis)
            if reason:
                obstacles.append(f"{name} ({reason})")
                members.append(Member(name, axis, ()))
                continue
            member = _member(name, axis, width, one.pairs, width_of(target, axis))
            if member is None:
                lost[name, axis] = None
            members.append(member or Member(name, axis, ()))
        if lost and not obstacles:
            return self.fold_outputs(members)
        return members, obstacles + [f"the order of {name}'s channels" for name, _ in lost]

    def fold_outputs(self, members: list[Member]) -> tuple[list[Member], list[str]]:
        """The group if several outputs of its writer are one channel of its readers.

        The two halves of a fused gate and up, or the pixels of a pixel shuffle: recognized by the widths, and by
        whether such units are independent of one another in the readers.
        """
        layers = {member.layer: self.model.get_submodule(member.layer) for member in members}
        widths = [width_of(layers[member.layer], member.axis) for member in members]
        units, wide, writer = min(widths), max(widths), members[0].layer
        reader = next((m.layer for m in members if m.axis == "in"), None)
        several = wide // units
        if reader is not None and widths[0] == wide and wide % units == 0 and set(widths) == {units, wide}:
            for outputs in (spans(units, *((1, n * units) for n in range(several))), spans(units, several)):
                readers = [m.layer for m in members if m.axis == "in"]
                if all(
                    width_of(layers[r], "in") == units and self.units_agree(writer, r, outputs, _one_per_unit(units))
                    for r in readers
                ):
                    by_width = {wide: outputs, units: _one_per_unit(units)}
                    return [Member(m.layer, m.axis, by_width[w]) for m, w in zip(members, widths, strict=True)], []
        return members, [f"the order of {member.layer}'s channels" for member in members if not member.of_unit]

    def group(self, name: str, members: list[Member], obstacles: list[str]) -> Group | None:
        """The group, unless it is the model's output, not asked for or skipped."""
        layers = [member.layer for member in members]
        kind = "channels" if obstacles and self.is_stream(members) else self.kind_of(layers)
        reason = ""
        if "output" in obstacles:
            reason = "writes the model's output"
        elif not any(member.axis == "in" for member in members) and not obstacles:
            reason = "no layer reads it"
        elif self.is_skipped(layers):
            reason = "in skip"
        elif kind not in self.kinds:
            reason = f"{kind}, not {' or '.join(sorted(self.kinds))}"
        if reason or obstacles:
            written = {member.layer for member in members if member.axis == "out" and self.is_candidate(member.layer)}
            reasons = reason or f"read by {truncate_list(sorted(set(obstacles)), 2)}"
            self.left_out |= dict.fromkeys([name, *sorted(written - {name})], reasons)
            if not reason:
                self.blocked[name] = reasons
            return None
        return Group(kind, name, len(members[0].of_unit), tuple(members))

    def is_candidate(self, name: str) -> bool:
        """Whether the layer of this name is a linear or a convolution."""
        return is_candidate(self.model.get_submodule(name))

    def kind_of(self, layers: Sequence[str]) -> Kind:
        """FFN, if the layers are linears of one transformer block, none of them its attention's; else channels.

        Layers between the linears, such as a norm, may be of any class.
        """
        linears = all(is_linear(self.model.get_submodule(n)) for n in layers if self.is_candidate(n))
        within = any(all(layer.startswith(block) for layer in layers) for block in self.blocks)
        attends = bool(self.projections.intersection(layers)) or any(layer.startswith(self.inner) for layer in layers)
        return "ffn" if linears and within and not attends else "channels"

    def is_stream(self, members: Sequence[Member]) -> bool:
        """Whether a layer that reads the units leads to one that writes them: a residual stream, not an FFN."""
        node_of = self.graph.module2node
        writers, readers = (
            {node_of[self.model.get_submodule(m.layer)] for m in members if m.axis == axis} for axis in ("out", "in")
        )
        waiting, seen = list(readers), set(readers)
        while waiting:
            new = set(waiting.pop().outputs) - seen
            if new & writers:
                return True
            seen |= new
            waiting += new
        return False


def _attention_modules(model: nn.Module) -> list[str]:
    """Modules whose class name contains "attention"."""
    return [name for name, module in model.named_modules() if "attention" in type(module).__name__.lower()]


def _one_per_unit(width: int) -> Units:
    return tuple((position,) for position in range(width))


def _unit_of_position(units: Units) -> list[int]:
    """The unit of each position."""
    of_position = {position: unit for unit, positions in enumerate(units) for position in positions}
    return [of_position[position] for position in range(len(of_position))]


def _member(
    layer: str, axis: Axis, width: int, pairs: Sequence[tuple[int, int | None]], own_width: int
) -> Member | None:
    """The member, unless its positions are not given for every unit alike, or lie beyond the layer's own width."""
    of_unit: list[list[int]] = [[] for _ in range(width)]
    for position, root in pairs:
        if root is None or not 0 <= position < own_width:
            return None
        of_unit[root].append(position)
    if len({len(unit) for unit in of_unit}) != 1 or len({position for position, _ in pairs}) != len(pairs):
        return None
    return Member(layer, axis, tuple(tuple(unit) for unit in of_unit))


def _group_of_attention(attention: Attention) -> Group:
    units, size, per_unit = attention.kv_heads, attention.head_dim, attention.queries_per_unit
    if attention.fused_rows is not None:
        writers = [Member(attention.query, "out", attention.fused_rows)]
    else:
        writers = [Member(attention.query, "out", spans(units, size * per_unit))]
        writers += [Member(layer, "out", spans(units, size)) for layer in (attention.key, attention.value)]
    members = (*writers, Member(attention.output, "in", spans(units, size * per_unit)))
    return Group("heads", attention.name, units, members, attention)
