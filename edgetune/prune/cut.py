"""Cut units out of a model's layers, update attributes and config, check the result, and undo a failed cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.inputs import Inputs, call, tensors_in
from edgetune.core.layers import is_transposed
from edgetune.core.modes import preserve_state
from edgetune.prune.attention import HEAD_COUNTS, display_name
from edgetune.prune.changes import Changes
from edgetune.prune.config import FFN_WIDTHS, follow_widths
from edgetune.prune.groups import Cut
from edgetune.prune.layers import (
    BATCH_NORMS,
    CONVOLUTIONS,
    TRANSPOSED,
    Side,
    axis_of,
    channel_dimension,
    is_depthwise,
    weight_of,
    width_of,
)
from edgetune.prune.structure import add_entry, layers_entry

ALL_HEADS = ("all_head_size", "attn_dim", "inner_dim", "split_size")  # heads x head size, as attention modules call it


class ParameterAxis(NamedTuple):
    """A parameter of a layer along one dimension; of the layer's weight the axis says which."""

    layer: str
    axis: Side
    parameter: str
    dim: int


Dropped = dict[ParameterAxis, set[int]]  # the positions that go, by where they are


@torch.no_grad()
def cut(model: nn.Module, cuts: Sequence[Cut], inputs: Inputs, fill: dict[str, Tensor] | None = None) -> dict[str, str]:
    """Cut the units out in place, and check that the result equals the old model with those units at zero.

    The output of every layer that reads units is compared, and the model's. `fill`: for such a layer, the value `(in,)`
    of dropped inputs instead of zero; it is folded into the layer's bias. Groups whose width is read elsewhere stay as
    they are: returns their names and why. Raises `EdgetuneError`, with the model as it was, if all are such.
    """
    left: dict[str, str] = {}
    remaining = list(cuts)
    with preserve_state(model):
        while remaining:
            changes, reason = _try_cuts(model, remaining, inputs, fill or {})
            if not reason:
                add_entry(model, layers_entry(model, changes))
                return left
            changes.undo()
            failing = _failing_alone(model, remaining, inputs, fill or {}) or {c.group.name: reason for c in remaining}
            left |= failing
            remaining = [one for one in remaining if one.group.name not in failing]
    _refuse(cuts, left)
    return left


def _failing_alone(model: nn.Module, cuts: Sequence[Cut], inputs: Inputs, fill: dict[str, Tensor]) -> dict[str, str]:
    failing: dict[str, str] = {}
    for one in cuts if len(cuts) > 1 else ():
        changes, reason = _try_cuts(model, [one], inputs, fill)
        changes.undo()
        if reason:
            failing[one.group.name] = reason
    return failing


def _refuse(cuts: Sequence[Cut], failing: Mapping[str, str]) -> None:
    """Raise for the cuts that fail, by name of their group, and why each does."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in failing.items():
        by_reason.setdefault(reason, []).append(name)
    listed = [f"{truncate_list(map(display_name, names), 4)}: {reason}" for reason, names in by_reason.items()]
    more = f"; and {len(listed) - 3} more reasons" if len(listed) > 3 else ""
    raise EdgetuneError(
        f"a cut width is read elsewhere, so these cannot be pruned: {'; '.join(listed[:3])}{more}",
        got=sorted({one.group.kind for one in cuts}),
        action="let the code take its widths from tensors and attributes, or change what",
    )


def _try_cuts(model: nn.Module, cuts: Sequence[Cut], inputs: Inputs, fill: dict[str, Tensor]) -> tuple[Changes, str]:
    """Make the cuts. Returns the changes and, if the result is wrong, the reason, else an empty string."""
    changes = Changes()
    dropped = dropped_positions(cuts)
    written = {place.layer: gone for place, gone in dropped.items() if place.axis == "out"}
    readers = {place.layer: written.get(place.layer, set()) for place in dropped if place.axis == "in"}
    torch.manual_seed(0)  # for a model that draws numbers, the same in both calls
    with _hold_dropped_inputs(model, dropped, fill), _outputs_of(model, readers) as wanted:
        wanted[""] = _floats_in(call(model, inputs))
    try:
        _apply(model, dropped, fill, changes)
        for one in cuts:
            _follow_modules(model, one, changes)
        follow_widths(model, cuts, changes)
        torch.manual_seed(0)
        with _outputs_of(model, {name: set() for name in readers}) as got:
            got[""] = _floats_in(call(model, inputs))
    except Exception as error:  # whatever the model's own code raises
        changes.undo()
        return changes, f"without these units the model does not run ({_reason(error)})"
    return changes, next(filter(None, (_difference(name, wanted[name], got[name]) for name in wanted)), "")


def _floats_in(output: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or "a check of its own fails"


@contextmanager
def _outputs_of(model: nn.Module, layers: Mapping[str, set[int]]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what the layers return in the block, without these positions of their channels."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    with ExitStack() as hooks:
        for name, gone in layers.items():
            layer = model.get_submodule(name)
            stays = [position for position in range(width_of(layer, "out")) if position not in gone]
            keep = torch.tensor(stays, device=weight_of(layer).device)

            def keep_output(
                layer: nn.Module, _: Any, output: Tensor, keep: Tensor = keep, outputs: list[Tensor] = outputs[name]
            ) -> None:
                # a copy: what follows may change the output in place
                outputs.append(output.index_select(channel_dimension(layer), keep))

            hooks.enter_context(layer.register_forward_hook(keep_output))
        yield outputs


@contextmanager
def _hold_dropped_inputs(model: nn.Module, dropped: Dropped, fill: dict[str, Tensor]) -> Iterator[None]:
    """Let the layers read the fill of dropped units, or zero: their columns are zero, and the bias has the rest."""
    changes = Changes()
    try:
        for place, drop in dropped.items():
            if place.axis == "in":
                layer: Any = model.get_submodule(place.layer)
                _fold(layer, sorted(drop), fill.get(place.layer), changes)
                kept = layer.weight.index_fill(axis_of(layer, "in"), _index(sorted(drop), layer.weight), 0.0)
                changes.set(layer, "weight", replacement(layer.weight, kept))
            elif place.axis == "raw":  # the code may read it as well
                owner = model.get_submodule(place.layer)
                whole: Tensor = getattr(owner, place.parameter)
                kept = whole.index_fill(place.dim, _index(sorted(drop), whole), 0.0)
                changes.set(owner, place.parameter, replacement(whole, kept))
        yield
    finally:
        changes.undo()


def _fold(layer: Any, gone: list[int], fill: Tensor | None, changes: Changes) -> None:
    """Add to the bias what the layer reads of inputs that are always at the fill."""
    if fill is not None and isinstance(layer.bias, Tensor):
        read = weight_of(layer)[:, gone] @ fill[gone].to(layer.weight)
        changes.set(layer, "bias", replacement(layer.bias, layer.bias + read))


def _index(positions: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(positions, device=like.device)


def _difference(name: str, wanted: Sequence[Tensor], got: Sequence[Tensor]) -> str:
    """How the output of a layer (the model: no name) differs from the expected one, in words; empty if it does not.

    Within 1e-4 of the largest value in fp32, and 5e-2 in 16 bits.
    """
    place = f"the output of {name}" if name else "the model's output"
    if [t.shape for t in wanted] != [t.shape for t in got]:
        return f"{place} changes its shape"
    for before, after in zip(wanted, got, strict=True):
        finite = before.isfinite()
        if not torch.equal(finite, after.isfinite()):
            return f"{place} is no longer finite where it was"
        largest = before[finite].abs().max().item() if finite.any() else 0.0
        off = (before[finite] - after[finite]).abs().max().item() if finite.any() else 0.0
        tolerance = 1e-4 if before.dtype in (torch.float32, torch.float64) else 5e-2
        if off > tolerance * largest + torch.finfo(before.dtype).tiny:
            return f"{place} is off by {off:.3g} of {largest:.3g}"
    return ""


def _apply(model: nn.Module, dropped: Dropped, fill: dict[str, Tensor], changes: Changes) -> None:
    """Slice every layer once along each axis: a layer that reads a concatenation is in several groups."""
    for place, drop in dropped.items():
        layer: Any = model.get_submodule(place.layer)
        if place.axis == "in":
            _fold(layer, sorted(drop), fill.get(place.layer), changes)
        if place.axis == "raw":
            _slice_raw(layer, place, drop, changes)
        elif place.axis == "groups":
            changes.set(layer, "groups", layer.groups - len(drop))
        else:
            _slice(layer, place.axis, [i for i in range(width_of(layer, place.axis)) if i not in drop], changes)
    for name in dict.fromkeys(place.layer for place in dropped):
        _follow_grouped(model.get_submodule(name), changes)


def dropped_positions(cuts: Iterable[Cut]) -> Dropped:
    """Positions to drop, by where they are."""
    dropped: Dropped = {}
    for one in cuts:
        for member in one.group.members:
            raw = (member.parameter, member.dim) if member.axis == "raw" else ("weight", 0)
            positions = dropped.setdefault(ParameterAxis(member.layer, member.axis, *raw), set())
            positions.update(position for unit in one.drop for position in member.of_unit[unit])
    return dropped


def _follow_grouped(layer: Any, changes: Changes) -> None:
    """The channels of a convolution in groups, whose weight has those of one group only."""
    if not isinstance(layer, CONVOLUTIONS) or layer.groups == 1 or is_depthwise(layer):
        return
    transposed = isinstance(layer, TRANSPOSED)
    first, second = ("in_channels", "out_channels") if transposed else ("out_channels", "in_channels")
    changes.set(layer, first, layer.weight.shape[0])
    changes.set(layer, second, layer.weight.shape[1] * layer.groups)


def _follow_modules(model: nn.Module, one: Cut, changes: Changes) -> None:
    for attention in one.group.attentions:
        kept = len(one.keep)
        heads, kv_heads = kept * attention.queries_per_unit, attention.kv_heads_after(kept)
        _set_heads(model.get_submodule(attention.name), heads, kv_heads, attention.head_dim, changes)
    for parent in {member.layer.rpartition(".")[0] for member in one.group.members if one.group.kind == "ffn"}:
        for name in FFN_WIDTHS:
            if getattr(model.get_submodule(parent), name, None) == one.group.units:
                changes.set(model.get_submodule(parent), name, len(one.keep))


def replacement(old: Tensor, new: Tensor) -> Tensor:
    """A new tensor in the role of an old one, as a parameter that trains where that one did."""
    new = new.detach().clone()
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _slice(layer: nn.Module, axis: Side, keep: list[int], changes: Changes) -> None:
    """Keep these positions of a linear, convolution or batch norm along one axis, and its width attributes with it."""
    weight = getattr(layer, "weight", None)
    if weight is not None:
        kept = torch.tensor(keep, device=weight.device)
        new = replacement(weight, weight.index_select(axis_of(layer, axis), kept))
        changes.set(layer, "weight", changes.shared.setdefault((id(weight), axis), new))
    for name in ("bias", "running_mean", "running_var") if axis == "out" else ():
        tensor = getattr(layer, name, None)
        if tensor is not None:
            changes.set(layer, name, changes.shared.setdefault((id(tensor), axis), replacement(tensor, tensor[keep])))
    for name in _width_attributes(layer, axis):
        changes.set(layer, name, len(keep))


def _slice_raw(layer: Any, place: ParameterAxis, drop: set[int], changes: Changes) -> None:
    """Take positions out of a parameter that is no layer's weight, or out of a table."""
    whole = getattr(layer, place.parameter)
    stays = [position for position in range(whole.shape[place.dim]) if position not in drop]
    changes.set(layer, place.parameter, replacement(whole, whole.index_select(place.dim, _index(stays, whole))))
    if isinstance(layer, nn.Embedding):
        changes.set(layer, ("num_embeddings", "embedding_dim")[place.dim], len(stays))


def _width_attributes(layer: nn.Module, axis: Side) -> tuple[str, ...]:
    """What a layer calls its own width along an axis; those of a convolution in groups follow later."""
    if isinstance(layer, BATCH_NORMS):
        return ("num_features",)
    if isinstance(layer, CONVOLUTIONS):
        if layer.groups > 1:
            return ("out_channels", "groups", "in_channels") if is_depthwise(layer) else ()
        return (f"{axis}_channels",)
    if is_transposed(layer):
        return ("nf",) if axis == "out" else ("nx",)
    return (f"{axis}_features",)


def _set_heads(module: nn.Module, heads: int, kv_heads: int, head_dim: int, changes: Changes) -> None:
    new = dict.fromkeys(HEAD_COUNTS, heads) | dict.fromkeys(ALL_HEADS, heads * head_dim)
    new |= dict.fromkeys(("num_key_value_heads", "num_kv_heads"), kv_heads)
    new |= {"num_key_value_groups": heads // kv_heads}
    for name, value in new.items():
        if isinstance(getattr(module, name, None), int):
            changes.set(module, name, value)
