"""Layers that peft wraps around a plain one.

A merged layer is always compared with the tuner layer on random input: several families change the bias as well as the
weight, and some have no plain equivalent at all.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core.carriers import Carrier
from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import is_transposed
from edgetune.core.packed_layers import is_nf4
from edgetune.core.probe import EXACT, outputs_of, probe_inputs, relative_difference
from edgetune.core.quiet import silence_libraries

TUNER = "edgetune_tuner"  # the attribute of a model with peft's tuner, where that holds tensors which layers share
# what peft raises where it cannot do something
FAILURES = (
    NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError,
    ArithmeticError,
)  # fmt: skip


def is_peft(layer: nn.Module) -> bool:
    """Whether peft put the layer there: a tuner layer of any family, or a layer kept with a trained copy of it."""
    return is_tuner(layer) or _is_auxiliary(layer)


def is_tuner(layer: nn.Module) -> bool:
    """Whether it is one of peft's tuner layers, of any family."""
    module = sys.modules.get("peft.tuners.tuners_utils")  # not imported: there is none, and peft takes seconds
    return module is not None and isinstance(layer, module.BaseTunerLayer)


def b_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trainable second factors `(out, rank)` of LoRA's linears and convolutions.

    Embeddings have none: their factors are called otherwise, and the first is the one that starts at zero.
    """
    parameters = [(name.split("."), p) for name, p in model.named_parameters() if p.requires_grad and p.dim() >= 2]
    return [parameter for path, parameter in parameters if "lora_B" in path]


def is_peft_model(model: nn.Module) -> bool:
    """Whether it is peft's own model, which wraps another."""
    module = sys.modules.get("peft.peft_model")
    return module is not None and isinstance(model, module.PeftModel)


def shares_tensors(tuner: Any) -> bool:
    """Whether peft's tuner holds tensors that its layers share; a file contains them under the tuner's own name."""
    return any(child is not tuner.model for child in tuner.children())


def is_for_parameter(layer: nn.Module) -> bool:
    """Whether peft adapts a bare parameter of any module, such as fused experts, by adding to it."""
    return is_tuner(layer) and type(layer).__name__ == "ParamWrapper"


def _is_auxiliary(layer: nn.Module) -> bool:
    """Whether peft keeps the layer with a trained copy (`modules_to_save`) or trained rows (trainable tokens)."""
    module = sys.modules.get("peft.utils.other")
    return module is not None and isinstance(layer, module.AuxiliaryTrainingWrapper)


def base_of(layer: Any) -> nn.Module:
    """The layer that peft wraps, without all tuner layers around it."""
    if _is_auxiliary(layer):
        trained = _trained_copy(layer)
        return base_of(trained) if is_peft(trained) else trained
    base: nn.Module = layer.get_base_layer()
    return base_of(base) if is_peft(base) else base


def _trained_copy(wrapper: Any) -> nn.Module:
    """The layer that computes instead of the one that peft keeps: its trained copy, its tuner layer, or itself."""
    if hasattr(wrapper, "token_adapter"):
        return wrapper.token_adapter  # type: ignore[no-any-return]
    active = [] if wrapper.disable_adapters else wrapper.active_adapters
    return wrapper.modules_to_save[active[0]] if active else wrapper.original_module  # type: ignore[no-any-return]


def peft_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """The tensors of the plain layer that computes the same as peft's, by their names in the plain layer.

    In the layout and type of the base. Raises `EdgetuneError` if there is no such plain layer: an adapter whose effect
    depends on its input, or one that peft merges wrongly.
    """
    if _is_auxiliary(layer):
        trained = _trained_copy(layer)
        return peft_tensors(trained) if is_peft(trained) else dict(trained.state_dict())
    plain = base_of(layer)
    trial = _in_float32(layer)
    inputs = probe_inputs(base_of(trial))
    expected = None if inputs is None else _try_outputs(trial, inputs)
    merged = _merge_tuner(trial, plain)
    if merged is not None and (_matches(merged, inputs, expected) if inputs else is_for_parameter(layer)):
        return _convert_to_stored(merged, plain)
    if inputs is not None and expected is not None and _is_linear(plain):
        linear = _read_affine_map(_in_float32(layer), plain)
        if _matches(linear, inputs, expected):
            return _convert_to_stored(linear, plain)
    family = type(layer).__module__.split(".")[2] if type(layer).__module__.startswith("peft.") else ""
    raise EdgetuneError(
        f"this adapter cannot be merged: no plain {type(plain).__name__} computes what it does",
        got=f"{family} {type(layer).__name__}".strip(),
        action="train a family that merges (LoRA, LoHa, LoKr, IA3, ...), or keep the adapter and do not finalize",
    )


def _in_float32(layer: nn.Module) -> nn.Module:
    """A copy in eval mode that computes in float32, so that a merge is rounded only once."""
    trial = copy.deepcopy(layer).eval().float()
    for original, module in zip(layer.modules(), trial.modules(), strict=True):
        if is_nf4(module):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True  # type: ignore[assignment]
            module.plain_dtype = torch.float32  # type: ignore[assignment]
            state = original.weight.quant_state  # type: ignore[union-attr]
            module.weight.quant_state = state  # type: ignore[union-attr]  # lost by a copy of what was unpickled
    return trial


def _try_outputs(layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor | None:
    """The layer's output; `None` if it needs more than the inputs of its base."""
    try:
        return outputs_of(layer, inputs)
    except FAILURES:
        return None


def _matches(plain: nn.Module, inputs: tuple[Tensor, ...], expected: Tensor | None) -> bool:
    return expected is not None and relative_difference(expected, outputs_of(plain, inputs)) <= EXACT


def _merge_tuner(trial: Any, plain: nn.Module) -> nn.Module | None:
    """The base layer after peft's own merge; `None` if peft cannot merge, or would round to 4 bits again."""
    if is_nf4(plain):
        return None
    chain = [trial]
    while is_tuner(chain[-1].base_layer):
        chain.append(chain[-1].base_layer)
    try:
        with silence_libraries():  # it warns of adapters that are merged already
            for tuner in reversed(chain):
                if not tuner.disable_adapters:
                    tuner.merge(safe_merge=True)
                elif tuner.merged:
                    tuner.unmerge()
        return base_of(trial)  # asked for after the merge: LayerNorm tuning puts another layer there
    except FAILURES:
        return None


def _is_linear(plain: nn.Module) -> bool:
    return isinstance(plain, nn.Linear) or is_nf4(plain) or is_transposed(plain)


@torch.no_grad()
def _read_affine_map(trial: nn.Module, plain: Any) -> nn.Module:
    """The linear layer with the map of the tuner layer, read from its outputs at zero and at each unit vector."""
    width = plain.weight.shape[0] if is_transposed(plain) else plain.in_features
    device = plain.weight.device
    bias = outputs_of(trial, (torch.zeros(1, 1, width, device=device),))[0, 0]
    base = base_of(trial)
    if base.bias is not None:  # read without it: a small weight beside a large bias would be rounded away
        base.bias.zero_()  # type: ignore[operator]
    offset = outputs_of(trial, (torch.zeros(1, 1, width, device=device),))
    weight = (outputs_of(trial, (torch.eye(width, device=device)[None],)) - offset)[0].T
    linear = nn.Linear(width, len(bias), bias=plain.bias is not None or bool(bias.any()), device=device)
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(bias)
    return linear


def _convert_to_stored(merged: nn.Module, plain: nn.Module) -> dict[str, Tensor]:
    dtype = getattr(plain, "plain_dtype", torch.float32) if is_nf4(plain) else None
    own = {} if is_nf4(plain) else plain.state_dict()
    weight_type = dtype or own["weight"].dtype if "weight" in own or dtype else None
    stored = {}
    for name, tensor in merged.state_dict().items():
        if name == "weight" and is_transposed(plain) and not is_transposed(merged):
            tensor = tensor.T.contiguous()
        reference = own.get(name)
        stored[name] = tensor.to(reference.dtype if reference is not None else weight_type or tensor.dtype)
    return stored


def _base_path(layer: Any) -> str:
    """`base_layer`, and for a module whose parameters peft wraps one by one, as often as it does."""
    path = "base_layer"
    while is_for_parameter(layer) and is_for_parameter(layer := layer.base_layer):
        path += ".base_layer"
    return path


PEFT = Carrier(owns=is_peft, tensors=peft_tensors, base=base_of, base_path=_base_path)
