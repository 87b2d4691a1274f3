"""What must be cut together, as a value to print and then act on.

The dependencies are read from torch-pruning's graph; nothing of that library leaves this file, and its own
`group.prune` and pruners are not used.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgetune.prune.attention import Attention, attention_names, block_of, describe, projections
from edgetune.registry import require
from edgetune.targets import matches
from edgetune.technique import EdgetuneError, Inputs, call, rows_of, shortened

Kind = Literal["ffn", "heads", "channels"]
Axis = Literal["out", "in"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


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


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a linear, convolution or batch norm."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; train/eval mode and trainability of every part as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, wanted in trainable.items():
            parameter.requires_grad_(wanted)


def tensors_in(output: Any) -> list[Tensor]:
    """Every floating-point tensor a model returned, in order; caches and other objects are passed over."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = tuple(output.values())
    return [t for value in output for t in tensors_in(value)] if isinstance(output, (tuple, list)) else []


def find_groups(model: nn.Module, inputs: Inputs, kinds: AbstractSet[str], skip: Collection[str]) -> list[Group]:
    """The groups of these kinds, in the model's order, without those that touch its output or a layer in `skip`.

    Raises `EdgetuneError` where the graph cannot be traced, and for a wanted group that cannot be followed.
    """
    return _Finder(model, inputs, kinds, skip).groups()


class _Finder:
    """The traced graph of one model, read once."""

    def __init__(self, model: nn.Module, inputs: Inputs, kinds: AbstractSet[str], skip: Collection[str]) -> None:
        self.model, self.kinds, self.skip = model, kinds, skip
        self.names = {module: name for name, module in model.named_modules()}
        self.graph = _trace(model, inputs)
        self.attentions = attention_names(model)
        self.blocked: dict[str, list[str]] = {}  # layers whose group cannot be followed, and why
        self.blocks = [block_of(model, name) + "." for name in self.attentions]
        self.projections = {
            (f"{name}.{child}" if name else child)
            for name in self.attentions
            for child in projections(model.get_submodule(name)) or ()
        }

    def groups(self) -> list[Group]:
        """Heads, then what the graph couples elsewhere; sorted by the model's own order."""
        found = []
        if "heads" in self.kinds:
            wanted = [name for name in self.attentions if not self.skipped([name])]
            described = [describe(self.model, name, self.readers) for name in wanted]
            found = [_of_attention(a) for a in described if not self.skipped([*a.writers, a.output])]
        if self.kinds & {"ffn", "channels"}:
            found += self.coupled()
        order = {name: index for index, name in enumerate(self.names.values())}
        return sorted(found, key=lambda group: (order[group.name], group.kind))

    def skipped(self, layers: Collection[str]) -> bool:
        """Whether a pattern fits one of the layers or something they lie in."""
        paths = {layer.rsplit(".", cut)[0] for layer in layers for cut in range(layer.count(".") + 1)}
        return any(matches(path, self.skip) for path in paths)

    def readers(self, layer: str) -> list[str]:
        """The first linears downstream of a layer."""
        waiting, seen, found = [self.graph.module2node[self.model.get_submodule(layer)]], set(), []
        while waiting:
            for node in waiting.pop().outputs:
                if node in seen:
                    continue
                seen.add(node)
                if isinstance(node.module, nn.Linear):
                    found.append(self.names[node.module])
                else:
                    waiting.append(node)
        return found

    def coupled(self) -> list[Group]:
        """The FFN and channel groups. Query, key and value layers are never a root: grouped heads do not end there."""
        found: list[Group] = []
        done = set(self.projections)
        roots = [m for m in self.graph.module2node if isinstance(m, (nn.Linear, *CONVOLUTIONS)) and m in self.names]
        for layer in sorted(roots, key=lambda module: list(self.names).index(module)):
            if self.names[layer] in done:
                continue
            items = self.items(layer)
            members = [m for m in items if isinstance(m, Member)]
            done |= {member.layer for member in members if member.axis == "out"}
            group = self.group(self.names[layer], members, [m for m in items if isinstance(m, str)])
            if group is not None:
                found.append(group)
        if self.blocked:
            read_by = (f"{name} by {shortened(obstacles, 2)}" for name, obstacles in self.blocked.items())
            raise EdgetuneError(
                f"these layers' widths are also read by what cannot be cut: {shortened(read_by)}",
                action=f"leave them out: skip: {list(self.blocked)}",
            )
        return found

    def items(self, layer: nn.Module) -> list[Member | str]:
        """What must follow when all outputs of `layer` are cut: members, and in words what cannot be followed."""
        graph, width = self.graph, weight_of(layer).shape[0]
        prune_out = graph.get_pruner_of_module(layer).prune_out_channels
        items: list[Member | str] = []
        for item in graph.get_pruning_group(layer, prune_out, list(range(width))):
            target, handler = item.dep.target, item.dep.handler
            writes = graph.is_out_channel_pruning_fn(handler)
            if target.module not in self.names:
                if isinstance(target.module, nn.Parameter):
                    items.append(f"the parameter {graph._param_to_name.get(target.module, target.name)}")
                elif not target.outputs:
                    items.append("output")
                continue
            name, reads = self.names[target.module], graph.is_in_channel_pruning_fn(handler)
            one_axis = not isinstance(target.module, (nn.Linear, *CONVOLUTIONS)) or _is_depthwise(target.module)
            axis: Axis = "out" if one_axis or (writes and not reads) else "in"
            if axis == "out" and not target.outputs:
                items.append("output")
            items.append(_member(name, axis, width, item.idxs, item.root_idxs) or f"the order of {name}'s inputs")
            if not _can_cut(target.module, axis):
                items.append(f"{name} ({type(target.module).__name__})")
        return items

    def group(self, name: str, members: list[Member], obstacles: list[str]) -> Group | None:
        """The group, unless it is the model's output, not asked for or skipped."""
        layers = [member.layer for member in members]
        reads = [member for member in members if member.axis == "in"]
        if "output" in obstacles or not reads:
            return None
        kind: Kind = "ffn" if self.in_one_block(layers) and not obstacles else "channels"
        if kind not in self.kinds or self.skipped(layers):
            return None
        if obstacles:
            self.blocked[name] = sorted(set(obstacles))
            return None
        return Group(kind, name, len(members[0].of_unit), tuple(members))

    def in_one_block(self, layers: list[str]) -> bool:
        """Whether the layers are linears of one transformer block, none of them its attention's."""
        linears = all(isinstance(self.model.get_submodule(layer), nn.Linear) for layer in layers)
        return linears and any(all(layer.startswith(block) for layer in layers) for block in self.blocks)


def _trace(model: nn.Module, inputs: Inputs) -> Any:
    pruning = require("torch_pruning", "prune")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    graph = pruning.DependencyGraph()
    with torch.enable_grad(), warnings.catch_warnings():
        # It warns of parameters outside known layers; here a group that holds one raises instead.
        warnings.simplefilter("ignore")
        try:
            graph.build_dependency(
                model,
                example_inputs=rows_of(inputs, 0, 2),
                forward_fn=call,
                output_transform=lambda output: [t for t in tensors_in(output) if t.grad_fn is not None],
                # Its default for this argument is shared between calls and models.
                unwrapped_parameters=[],
            )
        except (AttributeError, KeyError, IndexError, TypeError, RuntimeError, AssertionError) as error:
            raise EdgetuneError(
                f"the model's layers could not be traced: {type(error).__name__}: {error}",
                action="check that model(example inputs) runs and returns tensors that need a gradient",
            ) from error
    return graph


def _member(layer: str, axis: Axis, width: int, positions: list[int], roots: list[int | None]) -> Member | None:
    of_unit: list[list[int]] = [[] for _ in range(width)]
    for position, root in zip(positions, roots, strict=True):
        if root is None:
            return None
        of_unit[root].append(position)
    if len({len(unit) for unit in of_unit}) != 1 or len(set(positions)) != len(positions):
        return None
    return Member(layer, axis, tuple(tuple(unit) for unit in of_unit))


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, CONVOLUTIONS) and layer.groups == layer.in_channels == layer.out_channels > 1


def _can_cut(layer: nn.Module, axis: Axis) -> bool:
    if isinstance(layer, CONVOLUTIONS):
        return layer.groups == 1 or (axis == "out" and _is_depthwise(layer))
    return isinstance(layer, (nn.Linear, *BATCH_NORMS))


def _of_attention(attention: Attention) -> Group:
    units, size, per_unit = attention.kv_heads, attention.head_dim, attention.queries_per_unit

    def blocks(width: int, starts: tuple[int, ...] = (0,)) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(s + u * width + i for s in starts for i in range(width)) for u in range(units))

    if attention.fused:
        whole = units * size
        writers = [Member(attention.query, "out", blocks(size, (0, whole, 2 * whole)))]
    else:
        writers = [Member(attention.query, "out", blocks(size * per_unit))]
        writers += [Member(layer, "out", blocks(size)) for layer in (attention.key, attention.value)]
    members = (*writers, Member(attention.output, "in", blocks(size * per_unit)))
    return Group("heads", attention.name, units, members, attention)
