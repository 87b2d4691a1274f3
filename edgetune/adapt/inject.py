"""Let peft put an adapter on chosen layers, and check each layer before anything trains."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from edgetune.core import trainable
from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import is_transposed, refuse_shared, replace
from edgetune.core.packed_layers import is_nf4
from edgetune.core.peft_layers import base_of, is_peft, is_tuner, peft_tensors
from edgetune.core.plain import refuse_computed
from edgetune.core.probe import outputs_of, probe_inputs, relative_difference, rounding_tolerance
from edgetune.core.quiet import silence_libraries
from edgetune.core.registry import require
from edgetune.core.technique import Sample
from edgetune.core.wrapped import keep_base_keys
from edgetune.lean.frozen import freeze_batch_norms, remove_hooks
from edgetune.lean.reads import FirstForward, refuse_read_elsewhere

ADAPTER = "default"  # peft's own name for an only adapter
OWNER = "lora"


def can_adapt(layer: nn.Module) -> bool:
    """Whether peft has a LoRA for this layer: linears, convolutions, embeddings, and transformers' Conv1D."""
    return isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)) or is_transposed(layer)


def exact_targets(every: list[str], names: list[str]) -> list[str] | str:
    """Of `every` name in a model some, as peft's `target_modules`.

    A regular expression where peft's match by suffix would take in others.
    """
    loose = {name for name in every if any(name == n or name.endswith("." + n) for n in names)}
    return names if loose == set(names) else "|".join(re.escape(name) for name in names)


def inject(
    model: nn.Module,
    config: Any,
    chosen: dict[str, nn.Module],
    dtype: torch.dtype | None = None,
    sample: Sample | None = None,
) -> None:
    """Let peft wrap the chosen layers in place, and restore what trained if an open technique had chosen it.

    `dtype` is that of the adapter; `None`: the layer's own. Raises `EdgetuneError`, with the model as it was, if an
    adapted layer differs from the plain one, or could not be merged after training.
    """
    for name, layer in chosen.items():
        refuse_computed(name, layer)
        _refuse_groups(name, layer)
    refuse_shared(model, chosen)
    refuse_read_elsewhere(model, chosen, sample)
    trainable.remember(model, OWNER)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        _wrap(model, config, chosen, dtype)
    except EdgetuneError:
        _restore_layers(model, chosen)
        remove_hooks(model, FirstForward)
        trainable.recall(model, OWNER)
        raise
    keep = trainable.is_chosen(model)
    for parameter, training in before:
        parameter.requires_grad_(training and keep)
    for name in chosen:
        keep_base_keys(model.get_submodule(name))
    freeze_batch_norms(model)


def _wrap(model: nn.Module, config: Any, chosen: dict[str, nn.Module], dtype: torch.dtype | None) -> None:
    peft = require("peft", "lora")
    try:
        with silence_libraries():  # what peft warns of is checked here
            peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    except (ValueError, TypeError) as error:
        got = f"rank {config.r} on {config.target_modules}"
        raise EdgetuneError(f"peft refused: {error}", got=got, action="change targets or rank") from error
    adapted = {name for name, module in model.named_modules() if is_tuner(module)}
    if adapted != set(chosen):
        odd = sorted(adapted ^ set(chosen))
        raise EdgetuneError("peft did not adapt the chosen layers", got=odd, action="report this model")
    checked: set[str] = set()
    for name, plain in chosen.items():
        layer = model.get_submodule(name)
        _fix_convolution(layer)
        if dtype is not None:
            for key, parameter in layer.named_parameters():
                if "base_layer" not in key:
                    parameter.data = parameter.data.to(dtype)
        kind = f"{type(layer)} {type(plain)} {plain!r} {next(plain.parameters()).dtype}"
        if kind not in checked:  # a merge of a layer like it was tried
            checked.add(kind)
            _check_layer(name, layer, plain)


def _refuse_groups(name: str, layer: nn.Module) -> None:
    if isinstance(layer, _ConvNd) and layer.groups > 1:
        raise EdgetuneError(
            f"{name} is a convolution in {layer.groups} groups: a low-rank path would connect the groups, "
            "and a grouped convolution could not represent the merged weight",
            got=name,
            action=f'add "{name}" to skip, or train it with et.SparseUpdate',
        )


def _fix_convolution(layer: Any) -> None:
    """peft makes the first convolution of a side path without its base's dilation and padding mode."""
    base = base_of(layer)
    if isinstance(base, _ConvNd):
        for path in layer.lora_A.values():
            path.dilation, path.padding_mode = base.dilation, base.padding_mode
            path._reversed_padding_repeated_twice = list(base._reversed_padding_repeated_twice)


def _check_layer(name: str, layer: nn.Module, plain: nn.Module) -> None:
    """Raise unless the fresh adapter leaves the outputs, and a trained one would merge."""
    inputs = probe_inputs(plain)
    if inputs is None:
        raise EdgetuneError(f"{name}: no input is known to try the adapter on", got=type(plain).__name__)
    with torch.no_grad():
        expected = outputs_of(plain, inputs)
    difference = relative_difference(expected, outputs_of(layer, inputs))
    if difference > rounding_tolerance(expected.dtype):
        raise EdgetuneError(
            f"{name}: peft's layer differs from the plain layer, by {difference:.2g} of the largest output value",
            got=type(plain).__name__,
            action=f'add "{name}" to skip',
        )
    trial = copy.deepcopy(layer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in trial.named_parameters():
            if "base_layer" not in key and parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_(0.1 * noise.to(parameter))
    try:
        peft_tensors(trial)
    except EdgetuneError as error:
        error.action = f'add "{name}" to skip'
        error.within(name)
        raise


def _restore_layers(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """Put the plain layers back in the place of peft's."""
    for name, layer in chosen.items():
        replace(model, name, layer)
    model.__dict__.pop("peft_config", None)


def adapter_dtype(layers: dict[str, nn.Module]) -> torch.dtype | None:
    """float32 if a layer has 16 bits; `None`: adapters take the type of their layers."""
    dtypes = {p.dtype for layer in layers.values() if not is_nf4(layer) for p in layer.parameters()}
    return torch.float32 if dtypes & {torch.float16, torch.bfloat16} else None


def refuse_adapters(model: nn.Module) -> None:
    """Raise if the model has an adapter of peft's."""
    if any(is_peft(module) for module in model.modules()):
        raise EdgetuneError(
            "the model already has an adapter", action="put finalize between the two, or call et.finalize(model)"
        )
