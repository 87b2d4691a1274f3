"""Adapters on disk, in peft's own format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from edgetune.adapt.inject import ADAPTER, exact_targets, select_targets
from edgetune.adapt.rewritten import to_plain_lora
from edgetune.core.apply import active_techniques
from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.files import replace_files
from edgetune.core.holders import COMPILED, PARALLEL, plain_name, refuse_sharded, unwrap_model
from edgetune.core.peft_layers import TUNER, is_for_parameter, is_peft, is_peft_model, is_tuner, shares_tensors
from edgetune.core.registry import require
from edgetune.core.wrapped import without_parameterless

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # what peft puts before every key of a file
FROZEN_A = "edgetune.frozen_a"  # in the metadata of a file whose first factors did not train
NOTHING: Mapping[str, str] = MappingProxyType({})


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors` for plain peft to load. Returns the folder.

    Layers that were trained fully are saved as peft's `modules_to_save`; of prompts, the vectors alone are saved.
    """
    folder = Path(folder)
    refuse_sharded(model)
    tokens: Any = next((t for t in active_techniques(unwrap_model(model)) if hasattr(t, "save_tokens")), None)
    if tokens is not None:
        tokens.save_tokens(unwrap_model(model), folder)
        return folder
    model, config = _adapted_model(model)
    with without_parameterless(model):
        state = adapter_state(model)
        whole = _trained_whole(model)
        for name in whole:
            state |= {f"{PREFIX}{name}.{key}": value for key, value in model.get_submodule(name).state_dict().items()}
        config = copy.deepcopy(config)
        state = to_plain_lora(model, state, config, PREFIX)
        config.inference_mode, config.modules_to_save = True, [plain_name(name) for name in whole] or None
        every = [plain_name(name) for name, _ in model.named_modules() if name]
        adapted = [plain_name(n) for n, m in model.named_modules() if is_tuner(m) and not is_for_parameter(m)]
        if select_targets(config.target_modules, every) != adapted:
            config.target_modules = exact_targets(every, adapted)
        _warn_of_renamed_targets(model, config)
    frozen = any(".lora_A." in name and not p.requires_grad for name, p in model.named_parameters())
    return write_adapter(model, config, state, folder, {FROZEN_A: "true"} if frozen else {})


def write_adapter(
    model: nn.Module, config: Any, state: Mapping[str, Tensor], folder: Path, noted: Mapping[str, str] = NOTHING
) -> Path:
    """Write peft's two files of an adapter for `model`, with `noted` beside the tensors. Returns the folder."""
    config.base_model_name_or_path = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    tensors = {plain_name(key): value.detach().cpu().contiguous().clone() for key, value in state.items()}
    with replace_files(folder / WEIGHTS) as (temporary,):
        require("safetensors.torch", "lora").save_file(tensors, temporary, metadata={"format": "pt", **noted})
        config.save_pretrained(str(folder))
    return folder


def _warn_of_renamed_targets(model: nn.Module, config: Any) -> None:
    """Warn where peft, when it loads the config, takes a linear's name for that of an expert before they were fused."""
    renamed = copy.deepcopy(config)
    conversion = require("peft.utils.transformers_weight_conversion", "an adapter")
    try:
        conversion.convert_peft_config_for_transformers(renamed, model=model, conversions=None)
        misread = _target_names(config) - _target_names(renamed)
    except ValueError:  # only some of the names that were fused
        misread = _target_names(config)
    if misread:
        warnings.warn(
            f"in a {type(model).__name__}, peft itself takes {truncate_list(sorted(misread), 3)} for experts, and "
            "does not load this adapter correctly; et.load_adapter does",
            stacklevel=3,
        )


def _target_names(config: Any) -> set[str]:
    return {config.target_modules} if isinstance(config.target_modules, str) else set(config.target_modules)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the adapter on `model`, by their keys in a file of peft's."""
    peft = require("peft", "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model_state_dict(AsPeftModel(model), adapter_name=ADAPTER, save_embedding_layers=False)  # type: ignore[no-any-return]


class AsPeftModel(nn.Module):
    """A model under the names that its tensors have in peft's own model, with what the layers share."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model = model.__dict__.get(TUNER) or nn.Module()
        self.base_model.model = model
        self.peft_config = model.peft_config

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)


def _adapted_model(model: nn.Module) -> tuple[nn.Module, Any]:
    """The model inside its wrappers, and the config of its adapter."""
    config = None
    while True:
        config = getattr(model, "peft_config", {}).get(ADAPTER) or config
        children = dict(model.named_children())
        is_wrapper = set(children) in ({PARALLEL}, {COMPILED}) and not any(
            True for _ in model.parameters(recurse=False)
        )
        if is_peft_model(model):
            tuner, model = model.base_model, model.get_base_model()  # type: ignore[operator]
            if shares_tensors(tuner):
                model.__dict__[TUNER] = tuner
        elif is_wrapper:
            (model,) = children.values()
        else:
            break
    if config is None:
        raise EdgetuneError("the model has no adapter", action="save before et.finalize, or save the whole model")
    model.peft_config = {ADAPTER: config}  # type: ignore[assignment]
    return model, config


def trained_under(model: nn.Module) -> list[str]:
    """Names of the adapted layers whose own weight or bias trains as well."""
    adapted = [(name, module) for name, module in model.named_modules() if is_peft(module)]
    return [n for n, m in adapted if any(p.requires_grad for p in m.get_base_layer().parameters())]  # type: ignore[operator]


def _trained_whole(model: nn.Module) -> list[str]:
    """Names of the layers outside the adapter that train. Raises for those that peft's format cannot store."""
    under = trained_under(model)
    if under:
        raise EdgetuneError(
            f"{', '.join(under[:3])}: trains and has an adapter; an adapter file would not contain the trained weight",
            got=f"{len(under)} such layers",
            action="save the whole model, or leave these layers out of the scheme or the targets",
        )
    adapted = tuple(f"{name}." for name, module in model.named_modules() if is_peft(module))
    names = []
    for name, module in model.named_modules():
        if name.startswith(adapted) or not any(p.requires_grad for p in module.parameters(recurse=False)):
            continue
        if not name or any(True for _ in module.children()):
            raise EdgetuneError(
                f"{name or 'the model'} has parameters outside its layers, which peft cannot save on their own"
            )
        names.append(name)
    return names
