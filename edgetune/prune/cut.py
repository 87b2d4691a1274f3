"""Cut units out of a model's layers, update attributes and config, check the result, and undo a failed cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.inputs import Inputs, call, tensors_in
from edgetune.core.layers import is_transposed
from edgetune.core.modes import preserve_state
from edgetune.prune.attention import HEAD_COUNTS, attention_names, display_name, find_head_size, find_projections
from edgetune.prune.changes import Changes
from edgetune.prune.groups import Cut
from edgetune.prune.layers import (
    BATCH_NORMS,
    CONVOLUTIONS,
    Axis,
    axis_of,
    channel_dimension,
    is_linear,
    weight_of,
    width_of,
)

ALL_HEADS = ("all_head_size", "attn_dim", "inner_dim", "split_size")  # heads x head size, as attention modules call it
FFN_WIDTHS = (  # as config classes call it
    "intermediate_size", "ffn_dim", "hidden_dim", "n_inner", "d_ff", "ffn_hidden_size",
    "encoder_ffn_dim", "decoder_ffn_dim",
)  # fmt: skip


@torch.no_grad()
def cut(model: nn.Module, cuts: Sequence[Cut], inputs: Inputs, fill: dict[str, Tensor] | None = None) -> None:
    """Cut the units out in place, and check that the result equals the old model with those units at zero.

    The output of every layer that reads units is compared, and the model's. `fill`: for such a layer, the value `(in,)`
    of dropped inputs instead of zero; it is folded into the layer's bias. Raises `EdgetuneError` that names the failed
    cuts, with the model as it was, if something else reads a cut width.
    """
    with preserve_state(model):
        changes, reason = _try_cuts(model, cuts, inputs, fill or {})
        if not reason:
            return
        changes.undo()
        failing: dict[str, str] = {}
        for one in cuts if len(cuts) > 1 else ():
            own, reason_alone = _try_cuts(model, [one], inputs, fill or {})
            own.undo()
            if reason_alone:
                failing[one.group.name] = reason_alone
    _refuse(cuts, failing or {one.group.name: reason for one in cuts})


def _refuse(cuts: Sequence[Cut], failing: Mapping[str, str]) -> None:
    """Raise for the cuts that fail, by name of their group, and why each does."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in failing.items():
        by_reason.setdefault(reason, []).append(name)
    listed = [f"{truncate_list(map(display_name, names), 4)}: {reason}" for reason, names in by_reason.items()]
    more = f"; and {len(listed) - 3} more reasons" if len(listed) > 3 else ""
    kinds = {one.group.kind for one in cuts}
    whole = {k for k in kinds if all(one.group.name in failing for one in cuts if one.group.kind == k)}
    rest = sorted(kinds - whole)
    layers = {one.group.name: [member.layer for member in one.group.members] for one in cuts}
    skipped = [layer for name in failing for layer in ([name] if name else layers[name])]
    raise EdgetuneError(
        f"a cut width is read elsewhere, so these cannot be pruned: {'; '.join(listed[:3])}{more}",
        action=f"prune what: {rest} only" if whole and rest else f"leave them out: skip: {skipped}",
    )


def _try_cuts(model: nn.Module, cuts: Sequence[Cut], inputs: Inputs, fill: dict[str, Tensor]) -> tuple[Changes, str]:
    """Make the cuts. Returns the changes and, if the result is wrong, the reason, else an empty string."""
    changes = Changes()
    dropped = _dropped_positions(cuts)
    readers = {name: dropped.get((name, "out"), set()) for name, axis in dropped if axis == "in"}
    with _hold_dropped_inputs(model, cuts, fill), _outputs_of(model, readers) as wanted:
        wanted[""] = _floats_in(call(model, inputs))
    try:
        _apply(model, cuts, fill, changes)
        _follow_config(model, cuts, changes)
        with _outputs_of(model, {name: set() for name in readers}) as got:
            got[""] = _floats_in(call(model, inputs))
    except Exception as error:  # whatever the model's own code raises
        changes.undo()
        return changes, f"without these units the model does not run ({_reason(error)})"
    return changes, next(filter(None, (_difference(name, wanted[name], got[name]) for name in wanted)), "")


def _floats_in(output: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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
def _hold_dropped_inputs(model: nn.Module, cuts: Iterable[Cut], fill: dict[str, Tensor]) -> Iterator[None]:
    """Hold the inputs that belong to dropped units at their fill, or zero."""
    with ExitStack() as hooks:
        for (name, axis), drop in _dropped_positions(cuts).items():
            if axis == "out":
                continue
            layer = model.get_submodule(name)
            mask = torch.ones(width_of(layer, axis), dtype=torch.bool, device=weight_of(layer).device)
            mask[sorted(drop)] = False
            value = fill.get(name, torch.zeros(())).to(weight_of(layer))
            if isinstance(layer, CONVOLUTIONS):
                mask = mask.view(-1, *(1 for _ in layer.kernel_size))

            def hold(_: nn.Module, args: tuple[Tensor, ...], m: Tensor = mask, v: Tensor = value) -> Any:
                return (torch.where(m, args[0], v.to(args[0].dtype)), *args[1:])

            hooks.enter_context(layer.register_forward_pre_hook(hold))
        yield


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


def _apply(model: nn.Module, cuts: Sequence[Cut], fill: dict[str, Tensor], changes: Changes) -> None:
    """Slice every layer once along each axis: a layer that reads a concatenation is in several groups."""
    for (name, axis), drop in _dropped_positions(cuts).items():
        layer = model.get_submodule(name)
        if axis == "in" and name in fill and isinstance(layer.bias, Tensor):
            gone, weight = sorted(drop), weight_of(layer)
            changes.set(
                layer, "bias", _replacement(layer.bias, layer.bias + weight[:, gone] @ fill[name][gone].to(weight))
            )
        _slice(layer, axis, [i for i in range(width_of(layer, axis)) if i not in drop], changes)
    for one in cuts:
        _follow_modules(model, one, changes)


def _dropped_positions(cuts: Iterable[Cut]) -> dict[tuple[str, Axis], set[int]]:
    """Positions to drop, by layer and axis."""
    dropped: dict[tuple[str, Axis], set[int]] = {}
    for one in cuts:
        for member in one.group.members:
            positions = dropped.setdefault((member.layer, member.axis), set())
            positions.update(position for unit in one.drop for position in member.of_unit[unit])
    return dropped


def _follow_modules(model: nn.Module, one: Cut, changes: Changes) -> None:
    attention, units = one.group.attention, len(one.keep)
    if attention is not None:
        module, heads = model.get_submodule(attention.name), units * attention.queries_per_unit
        _set_heads(module, heads, units, attention.head_dim, changes)
    for parent in {member.layer.rpartition(".")[0] for member in one.group.members if one.group.kind == "ffn"}:
        for name in FFN_WIDTHS:
            if getattr(model.get_submodule(parent), name, None) == one.group.units:
                changes.set(model.get_submodule(parent), name, units)


def _replacement(old: Tensor, new: Tensor) -> Tensor:
    new = new.detach().clone()
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _slice(layer: nn.Module, axis: Axis, keep: list[int], changes: Changes) -> None:
    """Keep these positions of a linear, convolution or batch norm along one axis, and its width attributes with it."""
    weight = getattr(layer, "weight", None)
    if weight is not None:
        kept = torch.tensor(keep, device=weight.device)
        changes.set(layer, "weight", _replacement(weight, weight.index_select(axis_of(layer, axis), kept)))
    for name in ("bias", "running_mean", "running_var") if axis == "out" else ():
        tensor = getattr(layer, name, None)
        if tensor is not None:
            changes.set(layer, name, _replacement(tensor, tensor[keep]))
    for name in _width_attributes(layer, axis):
        changes.set(layer, name, len(keep))


def _width_attributes(layer: nn.Module, axis: Axis) -> tuple[str, ...]:
    """What a layer calls its own width along an axis."""
    if isinstance(layer, BATCH_NORMS):
        return ("num_features",)
    if isinstance(layer, CONVOLUTIONS):
        both = axis == "out" and layer.groups > 1
        return ("out_channels", "groups", "in_channels") if both else (f"{axis}_channels",)
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


def _follow_config(model: nn.Module, cuts: Sequence[Cut], changes: Changes) -> None:
    """Write the new widths into a Hugging Face config, if it can express them: the same in every layer.

    A config without `head_dim` takes hidden size / heads for it, so a head count in it would be read as other heads:
    there the old count stays, and `resize_like` reads the new one from the weights.
    """
    config = getattr(model, "config", None)
    if config is None:
        return
    new: dict[str, set[tuple[int, int]]] = {}
    for one in cuts:
        for name, before, after in _config_widths(one):
            new.setdefault(name, set()).add((before, after))
    for name, widths in new.items():
        kind = "ffn" if name in FFN_WIDTHS else "heads"
        if len(widths) != 1 or not _in_all_layers(config, cuts, kind):
            continue
        if kind == "heads" and not isinstance(getattr(config, "head_dim", None), int):
            continue
        ((before, after),) = widths
        unset = name == "n_inner" and hasattr(config, name) and config.n_inner is None  # four times the model's width
        if unset or getattr(config, name, None) == before:
            changes.set(config, name, after)


def _config_widths(one: Cut) -> list[tuple[str, int, int]]:
    if one.group.kind == "ffn":
        return [(name, one.group.units, len(one.keep)) for name in FFN_WIDTHS]
    attention = one.group.attention
    if attention is None:
        return []
    kept = len(one.keep) * attention.queries_per_unit
    return [(name, attention.heads, kept) for name in HEAD_COUNTS] + [
        ("num_key_value_heads", attention.kv_heads, len(one.keep))
    ]


def _in_all_layers(config: Any, cuts: Sequence[Cut], kind: str) -> bool:
    pairs = (("encoder_layers", "decoder_layers"), ("num_layers", "num_decoder_layers"))
    layers = getattr(config, "num_hidden_layers", None)
    if getattr(config, "is_encoder_decoder", False):
        both = [(getattr(config, a, None), getattr(config, b, None)) for a, b in pairs]
        layers = next((a + b for a, b in both if isinstance(a, int) and isinstance(b, int)), None)
    return layers is None or sum(1 for one in cuts if one.group.kind == kind) == layers


@torch.no_grad()
def resize_like(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Give the layers of an unpruned `model` the widths that a pruned model's state dict has, in place, and return it.

    For a pruned model whose config cannot express its widths (BERT takes hidden size / heads for the size of a head):
    build it from the config, resize, then `load_state_dict(state)`. Heads keep their size, so their number follows.
    """
    names = [n for n in attention_names(model) if find_projections(model.get_submodule(n))]
    sizes = {n: (find_head_size(model, n), _queries_per_unit(model.get_submodule(n))) for n in names}
    changes = Changes()
    try:
        for name, layer in model.named_modules():
            if (is_linear(layer) or isinstance(layer, (*CONVOLUTIONS, *BATCH_NORMS))) and f"{name}.weight" in state:
                _resize_layer(name, layer, state[f"{name}.weight"].shape, changes)
    except EdgetuneError:
        changes.undo()
        raise
    for name, (size, per_unit) in sizes.items():
        module = model.get_submodule(name)
        query, key, _ = find_projections(module) or ("", "", "")
        rows, key_rows = (width_of(module.get_submodule(child), "out") for child in (query, key))
        kv_heads = rows // size // (per_unit + 2) if query == key else key_rows // size
        heads = kv_heads * per_unit if query == key else rows // size
        _set_heads(module, heads, kv_heads, size, changes)
    return model


def _queries_per_unit(module: nn.Module) -> int:
    """Query heads that read one key-value head, as the module says."""
    per_unit = getattr(module, "num_key_value_groups", 1)
    heads, kv_heads = getattr(module, "num_heads", None), getattr(module, "num_kv_heads", None)
    if isinstance(heads, int) and isinstance(kv_heads, int):
        return heads // kv_heads
    return per_unit if isinstance(per_unit, int) else 1


def _resize_layer(name: str, layer: nn.Module, shape: Sequence[int], changes: Changes) -> None:
    old = tuple(layer.weight.shape) if isinstance(layer.weight, Tensor) else ()
    if len(old) != len(shape) or any(a < b for a, b in zip(old, shape, strict=True)) or old[2:] != tuple(shape[2:]):
        raise EdgetuneError(
            f"{name} cannot be cut to the state's shape",
            got=f"{old} -> {tuple(shape)}",
            action="pass the unpruned model",
        )
    axes: tuple[Axis, ...] = ("out",) if isinstance(layer, BATCH_NORMS) else ("out", "in")
    for axis in axes:
        after = shape[axis_of(layer, axis)]
        if after < old[axis_of(layer, axis)]:
            _slice(layer, axis, list(range(after)), changes)
