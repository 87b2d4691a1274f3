"""Taking units out of a model's layers, and what has to follow: attributes, config, a check, and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.prune.attention import HEAD_COUNTS, attention_names, head_size, projections
from edgetune.prune.groups import BATCH_NORMS, CONVOLUTIONS, Axis, Cut, tensors_in, undisturbed, weight_of
from edgetune.technique import EdgetuneError, Inputs, call

ALL_HEADS = ("all_head_size", "attn_dim", "inner_dim")  # heads x head size, as attention modules call it
FFN_WIDTHS = ("intermediate_size", "ffn_dim", "hidden_dim", "n_inner")  # as config classes call it


class Changes:
    """Every attribute set through it, with the value it had."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, attribute: str, value: Any) -> None:
        """Set it, and remember what was there."""
        self._before.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, value)

    def undo(self) -> None:
        """Put everything back, the last first."""
        while self._before:
            owner, attribute, value = self._before.pop()
            setattr(owner, attribute, value)


@torch.no_grad()
def cut(model: nn.Module, cuts: Sequence[Cut], inputs: Inputs, fill: dict[str, Tensor] | None = None) -> None:
    """Take the units out, in place, and prove it: the smaller model must equal the old one with those units at zero.

    `fill`: for a layer that reads units, the value `(in,)` to hold dropped inputs at instead of zero; it is folded
    into the layer's bias. Raises `EdgetuneError`, with the model as it was, when something else reads a cut width.
    """
    fill = fill or {}
    changes = Changes()
    with undisturbed(model):
        try:
            with _held(model, cuts, fill):
                wanted = tensors_in(call(model, inputs))
            _apply(model, cuts, fill, changes)
            _follow_config(model, cuts, changes)
            got = tensors_in(call(model, inputs))
            _compare(wanted, got)
        except Exception as error:
            changes.undo()
            if isinstance(error, EdgetuneError):
                raise
            raise EdgetuneError(
                f"the pruned model does not run, so a cut width is read elsewhere: {type(error).__name__}: {error}",
                action="leave the layers that are reshaped by a fixed width out with skip",
            ) from error


@contextmanager
def _held(model: nn.Module, cuts: Iterable[Cut], fill: dict[str, Tensor]) -> Iterator[None]:
    """The model with the inputs that belong to dropped units held at their fill, or zero."""
    handles = []
    for (name, axis), drop in _dropped(cuts).items():
        if axis == "out":
            continue
        layer = model.get_submodule(name)
        mask = torch.ones(_width(layer, axis), dtype=torch.bool, device=weight_of(layer).device)
        mask[sorted(drop)] = False
        value = fill.get(name, torch.zeros(())).to(weight_of(layer))
        if isinstance(layer, CONVOLUTIONS):
            mask = mask.view(-1, *(1 for _ in layer.kernel_size))

        def hold(_: nn.Module, args: tuple[Tensor, ...], m: Tensor = mask, v: Tensor = value) -> tuple[Tensor, ...]:
            return (torch.where(m, args[0], v.to(args[0].dtype)), *args[1:])

        handles.append(layer.register_forward_pre_hook(hold))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _compare(wanted: list[Tensor], got: list[Tensor]) -> None:
    if [t.shape for t in wanted] != [t.shape for t in got]:
        raise EdgetuneError(
            "pruning changed the shape of the model's output",
            got=[tuple(t.shape) for t in got],
            action="leave the layers that write the output out with skip",
        )
    for before, after in zip(wanted, got, strict=True):
        tolerance = 1e-3 if before.dtype == torch.float32 else 5e-2
        if not torch.allclose(before, after, rtol=tolerance, atol=tolerance * max(1.0, before.abs().max().item())):
            raise EdgetuneError(
                "the pruned model is not the model without those units, so a cut width is read elsewhere",
                got=f"outputs off by {(before - after).abs().max().item():.3g}",
                action="find the layer by pruning one at a time (skip), and leave it out",
            )


def _apply(model: nn.Module, cuts: Sequence[Cut], fill: dict[str, Tensor], changes: Changes) -> None:
    """Slice every layer once along each axis: a layer that reads a concatenation is in several groups."""
    for (name, axis), drop in _dropped(cuts).items():
        layer = model.get_submodule(name)
        if axis == "in" and name in fill and isinstance(layer, nn.Linear):
            gone = sorted(drop)
            constant = layer.weight[:, gone] @ fill[name][gone].to(layer.weight)
            changes.set(layer, "bias", _like(layer.bias, layer.bias + constant))
        _slice(layer, axis, [i for i in range(_width(layer, axis)) if i not in drop], changes)
    for one in cuts:
        _follow_modules(model, one, changes)


def _dropped(cuts: Iterable[Cut]) -> dict[tuple[str, Axis], set[int]]:
    """Positions to drop, by layer and axis."""
    dropped: dict[tuple[str, Axis], set[int]] = {}
    for one in cuts:
        for member in one.group.members:
            positions = dropped.setdefault((member.layer, member.axis), set())
            positions.update(position for unit in one.drop for position in member.of_unit[unit])
    return dropped


def _width(layer: nn.Module, axis: Axis) -> int:
    if isinstance(layer, BATCH_NORMS):
        return layer.num_features
    return weight_of(layer).shape[0 if axis == "out" else 1]


def _follow_modules(model: nn.Module, one: Cut, changes: Changes) -> None:
    attention, units = one.group.attention, len(one.keep)
    if attention is not None:
        module, heads = model.get_submodule(attention.name), units * attention.queries_per_unit
        _set_heads(module, heads, units, attention.head_dim, changes)
    for parent in {member.layer.rpartition(".")[0] for member in one.group.members if one.group.kind == "ffn"}:
        for name in FFN_WIDTHS:
            if getattr(model.get_submodule(parent), name, None) == one.group.units:
                changes.set(model.get_submodule(parent), name, units)


def _like(old: Tensor, new: Tensor) -> Tensor:
    new = new.detach().clone()
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _slice(layer: nn.Module, axis: Axis, keep: list[int], changes: Changes) -> None:
    """Keep these positions of a linear, convolution or batch norm along one axis, and its width attributes with it."""
    if axis == "in":
        weight = weight_of(layer)
        changes.set(layer, "weight", _like(weight, weight[:, keep]))
        changes.set(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", len(keep))
        return
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(layer, name, None)
        if tensor is not None:
            changes.set(layer, name, _like(tensor, tensor[keep]))
    if isinstance(layer, BATCH_NORMS):
        changes.set(layer, "num_features", len(keep))
    elif isinstance(layer, CONVOLUTIONS):
        changes.set(layer, "out_channels", len(keep))
        if layer.groups > 1:
            changes.set(layer, "groups", len(keep))
            changes.set(layer, "in_channels", len(keep))
    else:
        changes.set(layer, "out_features", len(keep))


def _set_heads(module: nn.Module, heads: int, kv_heads: int, head_dim: int, changes: Changes) -> None:
    new = dict.fromkeys(HEAD_COUNTS, heads) | dict.fromkeys(ALL_HEADS, heads * head_dim)
    new |= {"num_key_value_heads": kv_heads, "num_key_value_groups": heads // kv_heads}
    for name, value in new.items():
        if isinstance(getattr(module, name, None), int):
            changes.set(module, name, value)


def _follow_config(model: nn.Module, cuts: Sequence[Cut], changes: Changes) -> None:
    """Write the new widths into a Hugging Face config, where it can say them: the same in every layer.

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
        if getattr(config, name, None) == before:
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
    layers = getattr(config, "num_hidden_layers", None)
    return layers is None or sum(1 for one in cuts if one.group.kind == kind) == layers


@torch.no_grad()
def resize_like(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Give the layers of an unpruned `model` the widths that a pruned model's state dict has, in place, and return it.

    For a pruned model whose config cannot say its widths (BERT takes hidden size / heads for the size of a head):
    build it from the config, resize, then `load_state_dict(state)`. Heads keep their size, so their number follows.
    """
    sizes = {n: head_size(model, n) for n in attention_names(model) if projections(model.get_submodule(n))}
    changes = Changes()
    try:
        for name, layer in model.named_modules():
            if isinstance(layer, (nn.Linear, *CONVOLUTIONS, *BATCH_NORMS)) and f"{name}.weight" in state:
                _shrink(name, layer, state[f"{name}.weight"].shape, changes)
    except EdgetuneError:
        changes.undo()
        raise
    for name, size in sizes.items():
        module = model.get_submodule(name)
        query, key, _ = projections(module) or ("", "", "")
        parts = 3 if query == key else 1
        heads, kv_heads = (module.get_parameter(f"{child}.weight").shape[0] // parts // size for child in (query, key))
        _set_heads(module, heads, kv_heads, size, changes)
    return model


def _shrink(name: str, layer: nn.Module, shape: Sequence[int], changes: Changes) -> None:
    old = tuple(weight_of(layer).shape)
    if len(old) != len(shape) or any(a < b for a, b in zip(old, shape, strict=True)) or old[2:] != tuple(shape[2:]):
        raise EdgetuneError(
            f"{name} cannot be cut to the state's shape",
            got=f"{old} -> {tuple(shape)}",
            action="pass the unpruned model",
        )
    axes: tuple[Axis, Axis] = ("out", "in")
    for axis, before, after in zip(axes, old, shape, strict=False):
        if after < before:
            _slice(layer, axis, list(range(after)), changes)
