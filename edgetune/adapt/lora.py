"""LoRA through peft: low-rank side paths on chosen layers, saved and loaded in peft's own format.

Hu et al., 2021, arXiv:2106.09685: `W x + (alpha / rank) B A x`, with B = 0 at the start.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from edgetune import attach, trainable
from edgetune.quiet import quiet
from edgetune.reads import refuse_read_elsewhere
from edgetune.registry import require
from edgetune.sparse.frozen import freeze_batch_norms, remove_hooks
from edgetune.targets import refuse_shared, select
from edgetune.technique import EdgetuneError, Sample, Technique
from edgetune.wrapped import is_peft, keep_base_keys, merge

ADAPTER = "default"  # peft's own name for an only adapter
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."  # what peft puts before every key of a file

# What peft's config may ask for and this loader cannot give: raise rather than leave it out.
_UNSUPPORTED = (
    "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication", "megatron_config",
    "modules_to_tie", "alora_invocation_tokens", "arrow_config",
)  # fmt: skip


class LoRA(Technique):
    """Train low-rank side paths on `targets`; the base stays as it is (or as an earlier sparse-update set it).

    `also_train`: layers that train whole, such as a fresh classifier; they are saved with the adapter.
    The side path counts `alpha / rank` times, or `alpha / sqrt(rank)` with `rslora`.
    `dora` also trains the length of each output row (Liu et al., 2024, arXiv:2402.09353).
    """

    name: ClassVar[str] = "lora"
    after: ClassVar[frozenset[str]] = frozenset({"sparse-update", "nf4", "prune", "lora"})
    exact: ClassVar[bool] = True

    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    targets: tuple[str, ...]
    skip: tuple[str, ...] = ()
    also_train: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Put the side paths on, in place."""
        peft = require("peft", "lora")
        _refuse_adapters(model)
        chosen = select(model, self.targets, self.skip, accept=can_adapt)
        whole = select(model, self.also_train) if self.also_train else {}
        _refuse_untrainable(model, whole)
        for name in chosen:
            inside = [outer for outer in whole if name == outer or name.startswith(outer + ".")]
            if inside:
                raise EdgetuneError(f"{name} is in both targets and also_train", got=inside[0], action="skip it in one")
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=exact_targets(model, list(chosen)),
            use_rslora=self.rslora,
            use_dora=self.dora,
            fan_in_fan_out=all(type(layer).__name__ == "Conv1D" for layer in chosen.values()),
        )
        inject(model, config, chosen)
        for layer in whole.values():
            for parameter in layer.parameters():
                parameter.requires_grad_(True)
        return model

    def finalize(self, model: nn.Module) -> nn.Module:
        """Merge the side paths into plain layers; a 4-bit base becomes a plain fp32 linear."""
        model = merge(model, is_peft)
        if hasattr(model, "peft_config"):
            del model.peft_config
        if not trainable.is_open(model, "sparse-update"):
            remove_hooks(model)
        trainable.recall(model, self.name)
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        """Keep the adapter in `folder/adapter`, unless layers under it trained too: then it is no part of its own."""
        if not _trained_under(model):
            save_adapter(model, folder / "adapter")


def can_adapt(layer: nn.Module) -> bool:
    """Whether peft has a LoRA for this layer: linears, convolutions, embeddings, and transformers' Conv1D."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    return isinstance(layer, kinds) or type(layer).__name__ == "Conv1D"


def exact_targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """The names as peft's `target_modules`; a regular expression where its match by suffix would take in others."""
    every = [name for name, _ in model.named_modules() if name]
    loose = {name for name in every if any(name == n or name.endswith("." + n) for n in names)}
    return names if loose == set(names) else "|".join(re.escape(name) for name in names)


def inject(model: nn.Module, config: Any, chosen: dict[str, nn.Module]) -> None:
    """Let peft wrap the chosen layers, and put back what trained if sparse-update had set it. In place."""
    peft = require("peft", "lora")
    refuse_read_elsewhere(model, chosen)
    refuse_shared(model, chosen)
    trainable.remember(model, LoRA.name)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with quiet():  # what peft warns of is checked here, by name
            peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    except (ValueError, TypeError) as error:
        trainable.recall(model, LoRA.name)
        raise EdgetuneError(f"peft refused: {error}", got=shown(config), action="change targets or rank") from error
    adapted = {name: module for name, module in model.named_modules() if is_peft(module)}
    if set(adapted) != set(chosen):
        odd = sorted(set(adapted) ^ set(chosen))
        raise EdgetuneError("peft did not adapt the layers that were chosen", got=odd, action="report this model")
    keep = trainable.is_open(model, "sparse-update")
    for parameter, training in before:
        parameter.requires_grad_(training and keep)
    for layer in adapted.values():
        keep_base_keys(layer)
    freeze_batch_norms(model)


def _refuse_untrainable(model: nn.Module, whole: dict[str, nn.Module]) -> None:
    """Raise for what cannot train whole: 4-bit weights, and weights tied to a layer that stays frozen."""
    for name, layer in whole.items():
        for inner, module in layer.named_modules(prefix=name):
            refuse_shared(model, {inner: module})
            for key, parameter in module.named_parameters(recurse=False):
                if not parameter.is_floating_point():
                    raise EdgetuneError(
                        f"{inner}.{key} is stored in {parameter.dtype} and cannot train", action="put it in skip of nf4"
                    )


def shown(config: Any) -> str:
    """The part of a config that says what it adapts."""
    return f"rank {config.r} on {config.target_modules}"


def _refuse_adapters(model: nn.Module) -> None:
    if any(is_peft(module) for module in model.modules()):
        raise EdgetuneError("the model already carries an adapter", action="call et.finalize(model) first")


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors` for plain peft to load. Returns the folder.

    Layers that trained whole beside the adapter go in as peft's `modules_to_save`.
    """
    peft, folder = require("peft", "lora"), Path(folder)
    config = getattr(model, "peft_config", {}).get(ADAPTER)
    if config is None:
        raise EdgetuneError("the model carries no adapter", action="save before et.finalize, or save the whole model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = peft.get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    whole = _trained_whole(model)
    for name in whole:
        state |= {f"{name}.{key}": value for key, value in model.get_submodule(name).state_dict().items()}
    config = copy.deepcopy(config)
    config.inference_mode, config.modules_to_save = True, whole or None
    config.base_model_name_or_path = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{WEIGHTS}.part"
    require("safetensors.torch", "lora").save_file(
        {_PREFIX + key: value.detach().contiguous().clone() for key, value in state.items()},
        unfinished,
        metadata={"format": "pt"},
    )
    config.save_pretrained(str(folder))
    os.replace(unfinished, folder / WEIGHTS)
    return folder


def _trained_under(model: nn.Module) -> list[str]:
    """Names of the adapted layers whose own weight or bias trains as well."""
    adapted = [(name, module) for name, module in model.named_modules() if is_peft(module)]
    return [n for n, m in adapted if any(p.requires_grad for p in m.get_base_layer().parameters())]  # type: ignore[operator]


def _trained_whole(model: nn.Module) -> list[str]:
    """Names of the layers outside the adapter of which something trains. Raises where peft's format has no place."""
    under = _trained_under(model)
    if under:
        raise EdgetuneError(
            f"{', '.join(under[:3])}: trains itself and carries an adapter; an adapter file would lose the first",
            got=f"{len(under)} such layers",
            action="save the whole model, or leave these layers out of the scheme or the targets",
        )
    adapted = tuple(f"{name}." for name, module in model.named_modules() if is_peft(module))
    found = []
    for name, module in model.named_modules():
        if name.startswith(adapted) or not any(p.requires_grad for p in module.parameters(recurse=False)):
            continue
        if not name or any(True for _ in module.children()):
            raise EdgetuneError(f"{name or 'the model'} owns parameters beside layers; peft cannot save them alone")
        found.append(name)
    return found


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put the adapter in `folder` (ours or plain peft's) on a plain model, in place. Every key is accounted for."""
    peft, folder = require("peft", "lora"), Path(folder)
    _refuse_adapters(model)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise EdgetuneError(f"{folder} holds no {file}", action="save with save_adapter or peft's save_pretrained")
    config = peft.PeftConfig.from_pretrained(str(folder))
    asked = [name for name in _UNSUPPORTED if getattr(config, name, None)]
    if config.peft_type != "LORA" or asked:
        raise EdgetuneError("this adapter is more than LoRA", got=asked or str(config.peft_type), allowed=["LORA"])
    state = require("safetensors.torch", "lora").load_file(folder / WEIGHTS)
    state = {key.removeprefix(_PREFIX): value for key, value in state.items()}
    names = {key.split(".lora_")[0] for key in state if ".lora_" in key}
    unknown = sorted(names - {name for name, _ in model.named_modules()})
    if unknown or not names:
        raise EdgetuneError("the adapter is for another model: no such layers", got=unknown or sorted(state))
    config.inference_mode, config.modules_to_save = False, None
    inject(model, config, {name: model.get_submodule(name) for name in names})
    _load(peft, model, state)
    loaded = LoRA(rank=config.r, alpha=max(1, round(config.lora_alpha)), targets=tuple(sorted(names)))
    setattr(model, attach._OPEN, [*attach.opened(model), loaded])  # so that et.finalize merges it
    return model


def _load(peft: Any, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load the adapter's tensors through peft and those of layers saved whole directly; the latter train."""
    whole = {key: value for key, value in state.items() if ".lora_" not in key}
    targets = model.state_dict()
    for key, value in whole.items():
        if key not in targets or targets[key].shape != value.shape:
            raise EdgetuneError("the adapter holds a tensor that this model has no place for", got=key)
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
