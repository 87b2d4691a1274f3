"""Adapters in peft's format, loaded into a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edgetune.adapt.files import CONFIG, PREFIX, WEIGHTS
from edgetune.adapt.inject import ADAPTER, adapter_dtype, inject, refuse_adapters
from edgetune.adapt.lora import LoRA
from edgetune.core.apply import add_active_technique
from edgetune.core.errors import EdgetuneError
from edgetune.core.holders import refuse_distributed, rewrap_model, unwrap_model
from edgetune.core.registry import require

# What peft's config may ask for and this loader cannot give: raise rather than leave it out.
_UNSUPPORTED = (
    "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication", "megatron_config",
    "modules_to_tie", "alora_invocation_tokens", "arrow_config",
)  # fmt: skip


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Load the adapter in `folder`, from edgetune or peft, into a plain model, in place. Every key must be used."""
    peft, folder, outer = require("peft", "lora"), Path(folder), model
    model = unwrap_model(model)
    refuse_distributed(outer)
    refuse_adapters(model)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise EdgetuneError(f"{folder} holds no {file}", action="save with save_adapter or peft's save_pretrained")
    config = peft.PeftConfig.from_pretrained(str(folder))
    asked = [name for name in _UNSUPPORTED if getattr(config, name, None)]
    if config.peft_type != "LORA" or asked:
        raise EdgetuneError("this adapter is more than LoRA", got=asked or str(config.peft_type), allowed=["LORA"])
    state = require("safetensors.torch", "lora").load_file(folder / WEIGHTS)
    state = {key.removeprefix(PREFIX): value for key, value in state.items()}
    names = {key.split(".lora_")[0] for key in state if ".lora_" in key}
    unknown = sorted(names - {name for name, _ in model.named_modules()})
    if unknown or not names:
        raise EdgetuneError("the adapter is for another model: no such layers", got=unknown or sorted(state))
    config.inference_mode, config.modules_to_save = False, None
    chosen = {name: model.get_submodule(name) for name in names}
    inject(model, config, chosen, adapter_dtype(chosen))
    _load(peft, model, state)
    loaded = LoRA(rank=config.r, alpha=max(1, round(config.lora_alpha)), targets=tuple(sorted(names)))
    add_active_technique(model, loaded)  # so that et.finalize merges it
    return rewrap_model(outer, model)


def _load(peft: Any, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load the adapter's tensors through peft and those of layers saved whole directly; the latter train."""
    whole = {key: value for key, value in state.items() if ".lora_" not in key}
    targets = model.state_dict()
    for key, value in whole.items():
        if key not in targets or targets[key].shape != value.shape:
            raise EdgetuneError("the adapter has a tensor that does not belong to any layer of this model", got=key)
        targets[key].copy_(value)
    for name, parameter in model.named_parameters():
        if name.replace(".base_layer.", ".") in whole:
            parameter.requires_grad_(True)
    rest = {key: value for key, value in state.items() if key not in whole}
    try:
        result = peft.set_peft_model_state_dict(model, rest, adapter_name=ADAPTER)
    except RuntimeError as error:
        raise EdgetuneError(f"the adapter does not fit this model: {error}") from error
    missing = [key for key in result.missing_keys if ".lora_" in key]
    if missing or result.unexpected_keys:
        raise EdgetuneError("the adapter does not fit this model", got=[*missing, *result.unexpected_keys])
