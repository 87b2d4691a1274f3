"""Merge layers that carry something extra into plain ones; each is compared before and after."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core.carriers import is_wrapped, plain_layer, plain_tensors
from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import replace
from edgetune.core.packed_layers import MergeParity, original_weight
from edgetune.core.peft_layers import TUNER, is_peft, is_peft_model
from edgetune.core.probe import outputs_of, probe_inputs, relative_difference, rounding_tolerance


def merge(model: nn.Module, which: Callable[[nn.Module], bool] = is_wrapped) -> nn.Module:
    """Replace every layer that `which` selects by its plain equivalent, in place, with everything that it wraps.

    Raises `EdgetuneError` if a weight is tied to another layer, which would change too, or if no plain layer computes
    the
    same. Layers merged before the error stay merged: the outputs are the same.
    """
    if which(model):
        return merge_layer(model)
    chosen = [name for name, module in model.named_modules(remove_duplicate=False) if which(module)]
    outermost = [name for name in chosen if not any(name.startswith(other + ".") for other in chosen)]
    layers = {name: model.get_submodule(name) for name in outermost}
    _refuse_tied(model, layers)
    merged: dict[int, nn.Module] = {}  # a layer may be in the model under several names
    for name, layer in layers.items():
        if id(layer) not in merged:
            try:
                merged[id(layer)] = merge_layer(layer)
            except EdgetuneError as error:
                error.within(name)
                raise
        replace(model, name, merged[id(layer)])
    left = [name for name, module in model.named_modules() if which(module)]
    if left:
        raise EdgetuneError("some layers still have adapters or slices after the merge", got=left)
    return model


@torch.no_grad()
def merge_layer(layer: nn.Module) -> nn.Module:
    """The plain layer with the dense weight and bias written into it; `requires_grad` stays that of the base.

    A 4-bit base becomes a new `nn.Linear` of its original type, and if its original weight was kept, that weight plus
    what the adapter adds. Raises `EdgetuneError`, with the layer unchanged, if
    the plain layer does not compute the same.
    """
    plain = plain_layer(layer)
    tensors = {name: tensor.detach() for name, tensor in plain_tensors(layer).items()}
    inputs = probe_inputs(plain)
    expected = None if inputs is None else outputs_of(layer, inputs)
    if is_wrapped(plain):  # a storage format in place of a plain layer
        merged, before = _new_linear(plain, tensors), {}
    else:
        before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
        merged = write_tensors(plain, tensors)
    difference = (
        0.0 if expected is None or inputs is None else relative_difference(expected, outputs_of(merged, inputs))
    )
    if difference > rounding_tolerance(next(merged.parameters()).dtype):
        _undo(merged, before)
        raise EdgetuneError(
            f"a merge would change what the {type(layer).__name__} computes, by {difference:.2g} of its largest value",
            action="leave the layer out with skip, or remove what else computes its weight",
        )
    if is_wrapped(plain):
        _move_onto_original(merged, plain, difference, expected, inputs)
    return merged


def _move_onto_original(merged: nn.Module, packed: nn.Module, difference: float, expected: Any, inputs: Any) -> None:
    """Add what packing rounded off, if the original weight was kept; note how far the layer is from the trained one."""
    original, moved = original_weight(packed), math.nan
    if original is not None:
        weight = merged.get_parameter("weight")
        weight.add_(original.to(weight.device) - plain_tensors(packed)["weight"])
        if expected is not None:
            moved = relative_difference(expected, outputs_of(merged, inputs))
    merged.merge_parity = MergeParity(difference, moved)  # type: ignore[assignment]


def _new_linear(packed: Any, tensors: dict[str, Tensor]) -> nn.Module:
    """An `nn.Linear` in place of a 4-bit one; a bias that did not change stays the same parameter."""
    linear = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(tensors["weight"])
    bias = tensors.get("bias")
    kept = bias is None or (packed.bias is not None and torch.equal(bias, packed.bias))
    linear.bias = packed.bias if kept else nn.Parameter(bias)  # type: ignore[assignment, arg-type]
    return linear.train(packed.training)


def write_tensors(plain: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Write the tensors into the plain layer, in place; a bias is added if there is none."""
    own = plain.state_dict(keep_vars=True)
    if not set(tensors) - {"bias"} <= set(own):
        raise EdgetuneError(
            f"the weight of this {type(plain).__name__} is computed at each call, so nothing can be written into it",
            got=sorted(own),
            action="fold it first: torch.nn.utils.parametrize.remove_parametrizations, or remove_weight_norm",
        )
    for name, tensor in tensors.items():
        if name in own:
            own[name].data.copy_(tensor)
        else:
            trains = any(parameter.requires_grad for parameter in plain.parameters(recurse=False))
            plain.register_parameter(name, nn.Parameter(tensor.to(own["weight"].dtype), requires_grad=trains))
    return plain


def _undo(plain: nn.Module, before: dict[str, Tensor]) -> None:
    for name in [name for name in plain.state_dict() if before and name not in before]:
        plain.register_parameter(name, None)
    for name, tensor in before.items():
        plain.state_dict(keep_vars=True)[name].data.copy_(tensor)


def _refuse_tied(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    weights = {id(getattr(plain_layer(m), "weight", None)): (n, plain_layer(m)) for n, m in layers.items()}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in weights and weights[id(weight)][1] is not module:
            raise EdgetuneError(
                f"{weights[id(weight)][0]} shares its weight with {name}; merging would change both",
                action="untie the two before wrapping: layer.weight = nn.Parameter(layer.weight.clone())",
            )


def merge_foreign_layers(model: nn.Module) -> nn.Module:
    """Merge what peft and bitsandbytes put on the model without edgetune, and remove peft's own model.

    Raises `EdgetuneError` for an adapter of peft that changes no layer, such as prompts and prefixes.
    """
    whole = {name: module for name, module in model.named_modules() if is_peft_model(module)}
    for name, module in whole.items():
        config: Any = module.active_peft_config
        if config.is_prompt_learning or not any(is_peft(inner) for inner in module.modules()):
            raise EdgetuneError(
                "this adapter changes no layer, so there is nothing to merge it into",
                where=name,
                got=str(getattr(config.peft_type, "value", config.peft_type)),
                action="train an adapter of weights (LoRA, LoHa, IA3, ...)",
            )
    if any(is_wrapped(module) for module in model.modules()):
        model = merge(model)
    for name in reversed(whole):  # the innermost first
        holder: Any = model.get_submodule(name)
        base: nn.Module = holder.get_base_model()
        if not name:
            model = base
        else:
            replace(model, name, base)
    for module in model.modules():
        for attribute in ("peft_config", TUNER):
            module.__dict__.pop(attribute, None)
    return model
