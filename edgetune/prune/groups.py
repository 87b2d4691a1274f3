"""Find the groups of layers that must be cut together, as values to print and then act on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

from torch import nn

from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.inputs import Inputs
from edgetune.core.layers import matches
from edgetune.prune.attention import Attention, Units, attention_names, block_of
from edgetune.prune.axes import Misaligned, UnitAxis, units_of
from edgetune.prune.follow import follow
from edgetune.prune.layers import (
    BATCH_NORMS,
    CONVOLUTIONS,
    Side,
    axis_of,
    cannot_cut,
    follows_weight,
    is_candidate,
    is_depthwise,
    is_linear,
)
from edgetune.prune.walk import OUTPUT

Kind = Literal["ffn", "heads", "channels"]


@dataclass(frozen=True)
class Member:
    """One parameter along one dimension. `of_unit[u]`: the positions on it that belong to unit `u`.

    `axis`: the units are outputs of the layer, its inputs, the groups of a convolution, or stand along dimension `dim`
    of a `parameter` that is no layer's weight.
    """

    layer: str
    axis: Side
    of_unit: Units
    parameter: str = "weight"
    dim: int = 0

    @property
    def width(self) -> int:
        """Positions that belong to units."""
        return sum(len(positions) for positions in self.of_unit)


@dataclass(frozen=True)
class Group:
    """Layers that can only be cut together, and the `units` they share: hidden units, channels, or heads.

    For attention a unit is one key-value head with the query heads that read it. Attentions are in one group where
    they share a position bias.
    """

    kind: Kind
    name: str
    units: int
    members: tuple[Member, ...]
    attentions: tuple[Attention, ...] = ()

    def along(self, axis: Side) -> tuple[Member, ...]:
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


@dataclass(frozen=True)
class Grouping:
    """The groups of a model, in its order.

    `blocked`: layers of a wanted kind whose group cannot be cut, and why. `unasked`: convolutions whose channels could
    be cut, were they asked for.
    """

    groups: tuple[Group, ...]
    blocked: dict[str, str]
    unasked: tuple[str, ...]


def find_groups(
    model: nn.Module, inputs: Inputs, kinds: AbstractSet[str], skip: Collection[str], every: bool = True
) -> Grouping:
    """The groups of these kinds without those that touch the model's output or a layer in `skip`.

    Raises `EdgetuneError` if the model's operators cannot be recorded, and for a kind without a group (`every` false:
    if there is no group at all), naming every layer seen and why it was left out.
    """
    finder = _Finder(model, inputs, kinds, skip)
    groups = finder.groups()
    for kind in sorted(kinds):
        if not any(group.kind == kind or not every for group in groups):
            finder.refuse(kind)
    return Grouping(tuple(groups), finder.blocked, tuple(finder.unasked))


class _Finder:
    """The axes of one model, read once."""

    def __init__(self, model: nn.Module, inputs: Inputs, kinds: AbstractSet[str], skip: Collection[str]) -> None:
        self.model, self.kinds, self.skip = model, kinds, skip
        self.walk = follow(model, inputs)
        self.places: dict[UnitAxis, list[tuple[str, int]]] = {}  # of each leaf: parameters, and along which dimension
        for name, axes in self.walk.parameters.items():
            for dim, axis in enumerate(axes):
                for leaf in axis.leaves():
                    self.places.setdefault(leaf, []).append((name, dim))
        self.values = {leaf for _, columns in self.walk.attended for leaf in columns.leaves()}
        self.heads = {leaf for parallel, _ in self.walk.attended for leaf in parallel.leaves()}
        self.buffers = {name for name, _ in model.named_buffers()}
        self.blocked: dict[str, str] = {}  # layers whose group cannot be cut, and why
        self.left_out: dict[str, str] = {}  # layers seen that lead to no group, and why
        self.unasked: list[str] = []  # convolutions whose channels could be cut
        named = [name for name, module in model.named_modules() if "attention" in type(module).__name__.lower()]
        beside = attention_names(model) or (named if "ffn" in kinds else [])
        self.blocks = [block_of(model, name) + "." for name in beside]
        self.inner = tuple(name + "." for name in beside if name in named)

    def groups(self) -> list[Group]:
        """Every group that was asked for, in the order of the layer that writes it first."""
        self.leave_raw()
        groups: list[Group] = []
        done: set[UnitAxis] = set()
        for name, layer in self.model.named_modules():
            if not is_candidate(layer):
                continue
            axes = self.walk.parameters.get(f"{name}.weight".lstrip("."))
            if axes is None:
                self.leave(name, self.kind_of([name]), cannot_cut(layer) or "never called")
                continue
            grouped = False  # of several factors of a layer's outputs, the first goes
            leaves = axes[axis_of(layer, "out")].leaves()
            for leaf in leaves:
                if leaf in done:
                    grouped = True
                elif not grouped and not self.is_inner(leaf, leaves):
                    group = self.group(name, leaf)
                    done.add(leaf)
                    grouped = group is not None
                    groups += [group] if group is not None else []
            if grouped:
                self.left_out.pop(name, None)
        self.leave_attentions(groups)
        return groups

    def leave_attentions(self, groups: Sequence[Group]) -> None:
        """Leave out attentions of which no heads were found."""
        seen = {each.name for group in groups for each in group.attentions} | self.blocked.keys()
        for name in dict.fromkeys([*attention_names(self.model), *(each.removesuffix(".") for each in self.inner)]):
            if not any(each == name or each.startswith(f"{name}.") or not name for each in seen):
                self.leave(name, "heads", "its heads cannot be followed")

    def is_inner(self, leaf: UnitAxis, leaves: Sequence[UnitAxis]) -> bool:
        """Whether it is the width of a head, or counts the queries that share keys and values."""
        heads = [each for each in leaves if each in self.heads and not each.blocked]
        if leaf in self.heads:
            return len(heads) > 1 and leaf is not heads[0]
        return leaf in self.values and bool(self.heads.intersection(leaves))

    def group(self, name: str, leaf: UnitAxis) -> Group | None:
        """The group of a leaf, unless it is not asked for, skipped, or cannot be cut."""
        members, obstacles = self.members_of(leaf)
        layers = list(dict.fromkeys(member.layer for member in members))
        attentions = self.attentions_of(leaf, members) if leaf in self.heads and members else ()
        kind = "heads" if leaf in self.heads else self.kind_of(layers or [name])
        obstacles += [reason for reason in leaf.blocked if reason != OUTPUT]
        if kind == "heads" and not attentions and not obstacles:
            obstacles.append("no single output projection reads its heads")
        called = attentions[0].name if attentions else name
        if self.is_skipped([called, *layers]):
            reason = "in skip"
        elif OUTPUT in leaf.blocked:
            reason = f"writes {OUTPUT}"
        elif not any(member.axis == "in" for member in members) and not obstacles:
            reason = "no layer reads it"
        elif kind not in self.kinds:
            reason = f"{kind}, not {' or '.join(sorted(self.kinds))}"
            if not obstacles and isinstance(self.model.get_submodule(name), CONVOLUTIONS):
                self.unasked.append(name)
        elif obstacles:
            self.leave(called, kind, f"read by {truncate_list(sorted(set(obstacles)), 2)}")
            return None
        else:
            return Group(kind, called, leaf.size, tuple(members), attentions)
        self.left_out[called] = reason
        return None

    def members_of(self, leaf: UnitAxis) -> tuple[list[Member], list[str]]:
        """The members that follow a cut of a leaf, and in words what cannot be cut."""
        members, obstacles = list[Member](), list[str]()
        for name, dim in self.places.get(leaf, ()):
            member, obstacle = self.member(leaf, name, dim)
            members += [member] if member is not None else []
            obstacles += [obstacle] if obstacle else []
        for layer, axis in self.walk.groups.items():
            if leaf in axis.leaves() and not is_depthwise(self.model.get_submodule(layer)):
                units = _by_unit(axis, leaf)
                members += [Member(layer, "groups", units)] if units is not None else []
                obstacles += [] if units is not None else [f"the order of {layer}'s groups"]
        return members, obstacles

    def member(self, leaf: UnitAxis, name: str, dim: int) -> tuple[Member | None, str]:
        """A parameter as a member; none where it follows another of its layer, or cannot be cut: that in words."""
        layer_name, _, own = name.rpartition(".")
        layer = self.model.get_submodule(layer_name)
        if follows_weight(layer, own):
            return None, ""
        side: Side = "raw"
        if isinstance(layer, BATCH_NORMS):
            side = "out"
        elif is_candidate(layer) and own == "weight":
            side = "out" if is_depthwise(layer) or dim == axis_of(layer, "out") else "in"
        elif name in self.buffers:
            return None, f"the buffer {name}"
        elif isinstance(layer, nn.MultiheadAttention):
            return None, f"{layer_name} (one raw parameter for queries, keys and values)"
        if side != "raw" and (reason := cannot_cut(layer)):
            return None, f"{layer_name} ({reason})"
        units = _by_unit(self.walk.parameters[name][dim], leaf)
        if units is None:
            return None, f"the order of {layer_name}'s channels"
        return Member(layer_name, side, units, own, dim), ""

    def attentions_of(self, leaf: UnitAxis, members: Sequence[Member]) -> tuple[Attention, ...]:
        """The attentions whose heads a leaf counts; none where one has no single output projection."""
        attentions: dict[str, Attention] = {}
        for parallel, columns in self.walk.attended:
            if leaf not in parallel.leaves():
                continue
            values = set(columns.leaves())
            writers = [m for m in members if m.axis == "out" and values.intersection(self.leaves_of(m))]
            readers = [m for m in members if m.axis == "in" and values.intersection(self.leaves_of(m))]
            kv_heads = leaf.size
            if not writers:  # all queries read one head of keys and values
                kv_heads, writers = 1, list(self.single_values(values))
            if not writers and not readers:
                continue  # the product of queries and keys
            if len(readers) != 1 or not writers:
                return ()
            value, width = writers[-1], columns.size
            heads = readers[0].width // width
            rows = tuple(tuple(positions[-width:]) for positions in value.of_unit)
            rows = rows if kv_heads > 1 or leaf.size == 1 else rows * leaf.size
            name = value.layer.rpartition(".")[0]
            attentions[value.layer] = Attention(name, value.layer, readers[0].layer, heads, kv_heads, leaf.size, rows)
        return tuple(attentions.values())

    def leaves_of(self, member: Member) -> list[UnitAxis]:
        """The leaves of the dimension of a member."""
        return self.walk.parameters[f"{member.layer}.{member.parameter}".lstrip(".")][member.dim].leaves()

    def single_values(self, values: AbstractSet[UnitAxis]) -> Iterator[Member]:
        """The layers that write the one head of values."""
        for name, dim in (place for leaf in values for place in self.places.get(leaf, ())):
            layer_name, _, own = name.rpartition(".")
            layer = self.model.get_submodule(layer_name)
            if own == "weight" and is_candidate(layer) and dim == axis_of(layer, "out"):
                units = units_of(self.walk.parameters[name][dim], next(iter(values)))
                yield Member(layer_name, "out", (tuple((units >= 0).nonzero().flatten().tolist()),), own, dim)

    def kind_of(self, layers: Sequence[str]) -> Kind:
        """FFN, if the layers are linears of one transformer block, none of them its attention's; else channels.

        Layers between the linears, such as a norm or a depthwise convolution, may be of any class.
        """
        named = {name: self.model.get_submodule(name) for name in layers}
        linears = all(is_linear(layer) or is_depthwise(layer) for layer in named.values() if is_candidate(layer))
        within = any(all(layer.startswith(block) for layer in layers) for block in self.blocks)
        attends = any(layer.startswith(self.inner) for layer in layers)
        return "ffn" if linears and within and not attends else "channels"

    def is_skipped(self, layers: Collection[str]) -> bool:
        """Whether a skip pattern matches one of the layers or a module around them."""
        paths = {layer.rsplit(".", cut)[0] for layer in layers for cut in range(layer.count(".") + 1)}
        return any(matches(path, self.skip) for path in paths)

    def leave(self, name: str, kind: str, reason: str) -> None:
        """Leave a layer out, as one that was asked for where its kind was."""
        self.left_out[name] = reason
        if kind in self.kinds and reason != "never called" and not self.is_skipped([name]):
            self.blocked[name] = reason

    def leave_raw(self) -> None:
        """Leave out what has no layers: experts in one parameter `(expert, ..., ...)`, `nn.MultiheadAttention`."""
        raw = (name for name, p in self.model.named_parameters() if p.dim() == 3 and "expert" in name.lower())
        for name in dict.fromkeys(each.rpartition(".")[0] for each in raw):
            if not is_candidate(self.model.get_submodule(name)):
                self.leave(name, "ffn", "experts whose weights are raw parameters")
        for name, module in self.model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                self.leave(name, "heads", "queries, keys and values in one raw parameter")

    def refuse(self, kind: str) -> None:
        """Raise for a kind that has no group, with what was seen."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(name)
        seen = "; ".join(f"{truncate_list(names, 4)} ({reason})" for reason, names in by_reason.items())
        none = kind == "heads" and not self.heads and not self.blocked
        raise EdgetuneError(
            f"nothing to prune: no layer can be cut as {kind}; seen: {seen}"
            if seen and not none
            else f"nothing to prune: the model has no {kind}",
            got=sorted(self.kinds),
            action="change what, or shorten skip",
        )


def _by_unit(axis: UnitAxis, leaf: UnitAxis) -> Units | None:
    """The positions of each unit of a leaf on an axis; `None` unless they are as many for each."""
    try:
        units = units_of(axis, leaf)
    except Misaligned:
        return None
    positions: list[list[int]] = [[] for _ in range(leaf.size)]
    for position, unit in enumerate(units.tolist()):
        if unit >= 0:
            positions[unit].append(position)
    return tuple(map(tuple, positions)) if len({len(each) for each in positions}) == 1 else None
