"""Adapters in peft's format, loaded into a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edgetune.adapt.adapter import Adapter
from edgetune.adapt.adaption_prompt import AdaptionPrompt
from edgetune.adapt.families import from_config, peft_types
from edgetune.adapt.files import CONFIG, FROZEN_A, PREFIX, WEIGHTS, AsPeftModel, adapter_state
from edgetune.adapt.inject import ADAPTER, inject, refuse_adapters, remove, select_targets
from edgetune.adapt.layer_kinds import kind_of
from edgetune.adapt.lora import LoRA, freeze_first_factors
from edgetune.adapt.poly import Poly
from edgetune.adapt.prompt import Prompt
from edgetune.core.apply import add_active_technique
from edgetune.core.errors import EdgetuneError
from edgetune.core.experts import fused_weights
from edgetune.core.holders import refuse_distributed, rewrap_model, unwrap_model
from edgetune.core.quiet import silence_libraries
from edgetune.core.registry import require

# What peft's config may ask for and this loader cannot give: raise rather than leave it out.
_UNSUPPORTED = (
    "lora_bias", "trainable_token_indices", "layer_replication", "megatron_config",
    "modules_to_tie", "alora_invocation_tokens", "arrow_config", "sample_at_inference",
)  # fmt: skip

_TOKENS: dict[str, Any] = {  # of adapters that are no weights
    **dict.fromkeys(("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"), Prompt.load_tokens),
    "ADAPTION_PROMPT": AdaptionPrompt.load_tokens,
}


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Load the adapter in `folder`, from edgetune or peft, into a plain model, in place. Every key must be used.

    It trains on as it did before; of p-tuning and projected prefixes a file holds the vectors, which then train alone.
    """
    peft, folder, outer = require("peft", "lora"), Path(folder), model
    model = unwrap_model(model)
    refuse_distributed(outer)
    refuse_adapters(model)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise EdgetuneError(f"{folder} holds no {file}", action="save with save_adapter or peft's save_pretrained")
    config = peft.PeftConfig.from_pretrained(str(folder))
    with require("safetensors", "lora").safe_open(folder / WEIGHTS, "pt") as opened:
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  no mapping
        frozen_a = FROZEN_A in (opened.metadata() or {})
    tokens = _TOKENS.get(str(getattr(config.peft_type, "value", config.peft_type)))
    technique = _load_weights(model, config, state, frozen_a) if tokens is None else tokens(model, config, state)
    add_active_technique(model, technique)  # so that et.finalize finalizes it
    return rewrap_model(outer, model)


def _load_weights(model: nn.Module, config: Any, state: dict[str, Tensor], frozen_a: bool) -> Adapter:
    """Load an adapter of weights."""
    peft = require("peft", "lora")
    _refuse_unsupported(config)
    names = _names(model, config, state)
    own = model.state_dict()
    whole = {key: value for key, value in state.items() if key.removeprefix(PREFIX) in own}
    for key, value in whole.items():
        if own[key.removeprefix(PREFIX)].shape != value.shape:
            raise EdgetuneError("the adapter does not fit this model", got=f"{key} of shape {tuple(value.shape)}")
    config.inference_mode, config.modules_to_save = False, None
    fused = _fused_weights(model, config)
    plain = [name for name in names if kind_of(model.get_submodule(name)) != "experts"]
    technique = _technique(config, [*plain, *fused], frozen_a)
    starts = [getattr(config, name, True) for name in ("init_weights", "init_lora_weights", "init_ia3_weights")]
    exact = technique.starts_exact and False not in starts
    chosen = {name: model.get_submodule(name) for name in names}
    inject(model, config, chosen, exact=exact, merges=technique.merges, prepare=technique.prepare)
    try:
        _load(peft, model, {key: value for key, value in state.items() if key not in whole})
    except EdgetuneError:
        remove(model, chosen)
        raise
    if frozen_a:
        freeze_first_factors(model.get_submodule(name) for name in names)
    _load_whole(model, {key.removeprefix(PREFIX): value for key, value in whole.items()})
    return technique


def _refuse_unsupported(config: Any) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    allowed = [*peft_types(), "POLY"]
    if kind not in allowed:
        action = "load it with peft itself; et.finalize merges it if plain layers can compute the same"
        raise EdgetuneError(
            "this adapter is of no family that is a technique", got=kind, allowed=allowed, action=action
        )
    asked = [name for name in _UNSUPPORTED if getattr(config, name, None)]
    if getattr(config, "bias", "none") != "none":
        asked.append(f"bias={config.bias}")
    if asked:
        title = "LoRA" if kind == "LORA" else kind
        raise EdgetuneError(f"this adapter is more than {title}", got=asked, action="load it with peft itself")


def _names(model: nn.Module, config: Any, state: dict[str, Tensor]) -> list[str]:
    """The layers that the file is for: those of its keys, or what its config targets where layers have none."""
    every = [name for name, _ in model.named_modules() if name]
    if config.peft_type == "LORA":
        keys = {key.removeprefix(PREFIX).split(".lora_")[0] for key in state if ".lora_" in key}
        keys = {key.removesuffix(".base_layer") for key in keys}  # of the first of two fused weights in a module
        unknown, names = sorted(keys - set(every)), [name for name in every if name in keys]
    else:
        tuner = require("peft", "lora").mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
        unknown, names = [], [name for name in every if tuner._check_target_module_exists(config, name)]
    if unknown or not names:
        raise EdgetuneError("the adapter is for another model: no such layers", got=unknown or sorted(state))
    return names


def _fused_weights(model: nn.Module, config: Any) -> list[str]:
    """The names of the fused weights of experts that the config targets. Raises for parameters of other modules."""
    targets = list(getattr(config, "target_parameters", None) or ())
    fused = select_targets(targets, list(fused_weights(model)))
    every = select_targets(targets, [name for name, _ in model.named_parameters()])
    others = [name for name in every if name not in fused]
    if others or (targets and not fused):
        raise EdgetuneError(
            "this adapter is for parameters other than the fused experts of a mixture", got=others or targets,
            action="load it with peft itself; et.finalize merges it",
        )  # fmt: skip
    return fused


def _load(peft: Any, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load the adapter's tensors through peft. Raises if one is missing or left over."""
    expected = set(adapter_state(model))
    left = sorted(set(state) - expected)
    if left:
        raise EdgetuneError("the adapter has a tensor that does not belong to any layer of this model", got=left)
    missing = sorted(expected - set(state))
    if missing:
        raise EdgetuneError("the adapter does not fit this model: tensors are missing", got=missing)
    try:
        with silence_libraries():
            result = peft.set_peft_model_state_dict(AsPeftModel(model), state, adapter_name=ADAPTER)
    except RuntimeError as error:
        raise EdgetuneError(f"the adapter does not fit this model: {error}") from error
    if result.unexpected_keys:
        raise EdgetuneError("the adapter does not fit this model", got=result.unexpected_keys)


def _load_whole(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load the layers that were saved whole, and let them train."""
    targets = model.state_dict()
    for key, value in state.items():
        targets[key].copy_(value)
    for name, parameter in model.named_parameters():
        if name.replace(".base_layer.", ".") in state:
            parameter.requires_grad_(True)


def _technique(config: Any, names: list[str], frozen_a: bool) -> Adapter:
    """The technique that finalizes the adapter."""
    if config.peft_type == "LORA":
        alpha = max(1, round(config.lora_alpha))
        return LoRA(rank=config.r, alpha=alpha, targets=tuple(names), frozen_a=frozen_a)
    if config.peft_type == "POLY":  # its file has no names of tasks
        tasks = tuple(map(str, range(config.n_tasks)))
        return Poly(tasks=tasks, rank=config.r, skills=config.n_skills, heads=config.n_splits, targets=tuple(names))
    return from_config(config, names)
