"""Let peft put an adapter on chosen layers, and check each layer before anything trains."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from edgetune.adapt.task_ids import TaskIds
from edgetune.core import trainable
from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import refuse_shared, replace
from edgetune.core.packed_layers import is_nf4
from edgetune.core.peft_layers import FAILURES, TUNER, base_of, is_peft, is_tuner, peft_tensors, shares_tensors
from edgetune.core.plain import refuse_computed
from edgetune.core.probe import outputs_of, probe_inputs, relative_difference, rounding_tolerance
from edgetune.core.quiet import silence_libraries
from edgetune.core.registry import require
from edgetune.core.technique import Sample
from edgetune.core.wrapped import keep_base_keys
from edgetune.lean.frozen import FrozenLayer, freeze_batch_norms, remove_hooks
from edgetune.lean.reads import FirstForward, refuse_read_elsewhere

ADAPTER = "default"  # peft's own name for an only adapter
OWNER = "adapter"  # in core.trainable: a model has one adapter at a time


def exact_targets(every: list[str], names: list[str]) -> list[str] | str:
    """Of `every` name in a model some, as peft's `target_modules`.

    A regular expression where peft's match by suffix would take in others.
    """
    return names if set(select_targets(names, every)) == set(names) else "|".join(re.escape(name) for name in names)


def select_targets(targets: Collection[str] | str, every: list[str]) -> list[str]:
    """Of `every` name in a model those that `targets`, peft's `target_modules`, select."""
    if isinstance(targets, str):
        return [name for name in every if re.fullmatch(targets, name)]
    return [name for name in every if any(name == target or name.endswith("." + target) for target in targets)]


def inject(
    model: nn.Module,
    config: Any,
    chosen: dict[str, nn.Module],
    sample: Sample | None = None,
    *,
    exact: bool = True,
    merges: bool = True,
    rewrites: bool = False,
    prepare: Callable[[nn.Module], None] | None = None,
) -> None:
    """Let peft wrap the chosen layers in place, and restore what trained if an open technique had chosen it.

    On 16-bit layers the adapter is in float32. Raises `EdgetuneError`, with the model as it was, if an adapted layer
    differs from the plain one (`exact`), or could not be merged after training (`merges`). `rewrites`: the base weight
    changes. `prepare` completes the layers before they are checked.
    """
    for name, layer in chosen.items():
        refuse_computed(name, layer)
    refuse_shared(model, chosen)
    refuse_read_elsewhere(model, chosen, sample)
    expected = _outputs_of_each_kind(chosen)
    trainable.remember(model, OWNER)
    in_float32 = _has_16_bits(chosen)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    weights = {name: layer.get_parameter("weight").detach().clone() for name, layer in chosen.items() if rewrites}
    try:
        _wrap(model, config, chosen, in_float32)
        if prepare is not None:
            prepare(model)
        for name, outputs in expected.items():
            _check_outputs(name, model.get_submodule(name), chosen[name], outputs, exact)
            if merges:
                _check_merge(name, model.get_submodule(name))
    except EdgetuneError:
        remove(model, chosen)
        for name, weight in weights.items():
            chosen[name].get_parameter("weight").data.copy_(weight)
        raise
    keep = trainable.is_chosen(model)
    for parameter, training in before:
        parameter.requires_grad_(training and keep)
    for name in chosen:
        keep_base_keys(model.get_submodule(name))
    freeze_batch_norms(model)


def _wrap(model: nn.Module, config: Any, chosen: dict[str, nn.Module], in_float32: bool) -> None:
    peft = require("peft", "an adapter")
    tuner_class = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    try:
        with silence_libraries(), _restore_compilers(), _keep_targets():  # what peft warns of is checked here
            tuner = tuner_class(model, config, adapter_name=ADAPTER)
    except FAILURES as error:
        names = list(chosen)
        raise EdgetuneError(f"peft refused: {error}", got=names, action="change targets or settings") from error
    if shares_tensors(tuner):
        model.__dict__[TUNER] = tuner  # not as a module: the model is one of its own
    adapted = {name.removesuffix(".base_layer") for name, module in model.named_modules() if is_tuner(module)}
    if adapted != set(chosen):
        odd = sorted(adapted ^ set(chosen))
        raise EdgetuneError("peft did not adapt the chosen layers", got=odd, action="report this model")
    for name in chosen:
        _fix_convolution(model.get_submodule(name))
    if in_float32:
        tuner._cast_adapter_dtype(ADAPTER)


@contextmanager
def _restore_compilers() -> Iterator[None]:
    """Restore CC and CXX, which peft's BOFT leaves at gcc where its CUDA extension cannot be built."""
    before = {name: os.environ[name] for name in ("CC", "CXX") if name in os.environ}
    try:
        yield
    finally:
        for name in ("CC", "CXX"):
            os.environ.pop(name, None)
        os.environ.update(before)


@contextmanager
def _keep_targets() -> Iterator[None]:
    """Let peft take the names as they are: in mixtures it reads some as names from before their experts were fused."""
    module = require("peft.utils.transformers_weight_conversion", "an adapter")
    before = module.convert_peft_config_for_transformers
    module.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        module.convert_peft_config_for_transformers = before


def _fix_convolution(layer: Any) -> None:
    """peft makes the first convolution of a side path without its base's dilation and padding mode."""
    base = base_of(layer)
    if isinstance(base, _ConvNd) and hasattr(layer, "lora_A"):
        for path in layer.lora_A.values():
            path.dilation, path.padding_mode = base.dilation, base.padding_mode
            path._reversed_padding_repeated_twice = list(base._reversed_padding_repeated_twice)


@torch.no_grad()
def _outputs_of_each_kind(chosen: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The outputs of one layer of each kind, on the inputs that the adapted one is then tried on."""
    first: dict[str, str] = {}
    for name, layer in chosen.items():
        first.setdefault(f"{type(layer)} {layer!r} {next(layer.parameters()).dtype}", name)
    outputs = {}
    for name in first.values():
        inputs = probe_inputs(chosen[name])
        if inputs is None:
            raise EdgetuneError(
                f"{name}: no input is known to try the adapter on", got=type(chosen[name]).__name__,
                action=f'add "{name}" to skip',
            )  # fmt: skip
        outputs[name] = outputs_of(chosen[name], inputs)
    return outputs


def _check_outputs(name: str, layer: nn.Module, plain: nn.Module, expected: Tensor, exact: bool) -> None:
    """Raise unless the layer runs and, if `exact`, leaves the outputs."""
    inputs = probe_inputs(plain)
    assert inputs is not None
    try:
        actual = outputs_of(layer, inputs)
    except FAILURES as error:
        dtype = next(p.dtype for p in plain.parameters())
        raise EdgetuneError(
            f"{name}: peft's {type(layer).__name__} does not run on {dtype}: {error}", got=type(plain).__name__,
            action=f'add "{name}" to skip',
        ) from error  # fmt: skip
    difference = relative_difference(expected, actual)
    if exact and difference > rounding_tolerance(expected.dtype):
        raise EdgetuneError(
            f"{name}: peft's layer differs from the plain layer, by {difference:.2g} of the largest output value",
            got=type(plain).__name__,
            action=f'add "{name}" to skip',
        )


def _check_merge(name: str, layer: nn.Module) -> None:
    """Raise unless a trained adapter would merge."""
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


def remove(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """Put the plain layers back in the place of peft's, and restore what trained."""
    for name, layer in chosen.items():
        replace(model, name, layer)
    for attribute in ("peft_config", TUNER):
        model.__dict__.pop(attribute, None)
    remove_hooks(model, (FirstForward, TaskIds) if trainable.is_chosen(model) else (FirstForward, TaskIds, FrozenLayer))
    trainable.recall(model, OWNER)


def _has_16_bits(layers: dict[str, nn.Module]) -> bool:
    dtypes = {p.dtype for layer in layers.values() if not is_nf4(layer) for p in layer.parameters()}
    return bool(dtypes & {torch.float16, torch.bfloat16})


def refuse_adapters(model: nn.Module) -> None:
    """Raise if the model has an adapter of peft's."""
    if any(is_peft(module) for module in model.modules()):
        raise EdgetuneError(
            "the model already has an adapter", action="put finalize between the two, or call et.finalize(model)"
        )
