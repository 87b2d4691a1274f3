"""An adapter as pairs of plain matrices beside the layers of a base: `layer(x) + (x A^T) B^T`, the scale in B."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.adapt.files import CONFIG, PREFIX, WEIGHTS
from edgetune.adapt.layer_kinds import kind_of, widths_of
from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import no_match_error
from edgetune.core.registry import require

MERGE = "merge it instead: et.finalize(et.load_adapter(model, folder)), and export the result"
PICKLED = "adapter_model.bin"
# Starts that take the adapter's first values out of the base's weight: the plain base would have them twice.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_BEYOND = (
    "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication", "megatron_config",
    "modules_to_tie", "alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora",
    "kasa_config", "monteclora_config",
)  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """An adapter: of each layer A `(rank, in)`, and B `(out, rank)` with the adapter's scale, both in fp32."""

    name: str
    factors: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(a.shape[0] for a, _ in self.factors.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return sum(4 * (a.numel() + b.numel()) for a, b in self.factors.values())


def read_low_rank(name: str, folder: str | Path, model: nn.Module) -> LowRank:
    """The LoRA in `folder`, in peft's format, for the layers of the plain base `model`, which stays as it is.

    Raises `EdgetuneError` for an adapter that two products beside each layer cannot represent, or that does not fit.
    """
    folder = Path(folder)
    try:
        config = _read_config(folder)
        return LowRank(name, _read_factors(folder / WEIGHTS, config, model))
    except EdgetuneError as error:
        raise error.within(f"adapter {name} ({folder})") from error.__cause__


def linear_widths(layer: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer; `None` for a layer of another kind."""
    return widths_of(layer) if kind_of(layer) in ("linear", "Conv1D") else None


def _read_config(folder: Path) -> dict[str, Any]:
    for file in (CONFIG, WEIGHTS):
        if (folder / file).is_file():
            continue
        if file == WEIGHTS and (folder / PICKLED).is_file():
            raise EdgetuneError(
                f"its weights are pickled, in {PICKLED}, and reading a pickle can run any code",
                action=f"load it where you trust it, and save it anew with peft's save_pretrained, as {WEIGHTS}",
            )
        raise EdgetuneError(
            f"the folder holds no {file}", action="save with et.save_adapter, or peft's save_pretrained"
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise EdgetuneError(f"{CONFIG} cannot be read: {error}", action="save the adapter anew") from error
    _refuse_beyond(config)
    return dict(config)


def _refuse_beyond(config: Mapping[str, Any]) -> None:
    """Raise for what is more than a low-rank product beside each layer."""
    family = config.get("peft_type")
    if family != "LORA":
        raise EdgetuneError(
            "only LoRA runs beside a base as two plain products",
            got=family,
            allowed=["LORA"],
            near="",  # LoHa is no slip of the finger
            action=f"convert it to LoRA first, or {MERGE}",
        )
    if config.get("use_dora"):
        raise EdgetuneError("DoRA also scales each row of the merged weight, which no side path can do", action=MERGE)
    if config.get("modules_to_save"):
        raise EdgetuneError(
            "the adapter has layers that were trained whole, which no side path can hold",
            got=config["modules_to_save"],
            action=f"put those layers into the base, or {MERGE}",
        )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGE_THE_BASE):
        raise EdgetuneError(
            "the adapter began by changing the weights of its base, and does not fit the plain one",
            got=f"init_lora_weights: {start}",
            action="save it with peft's path_initial_model_for_weight_conversion, or merge it",
        )
    if config.get("bias", "none") != "none":
        raise EdgetuneError("the adapter also trained biases of the base", got=config["bias"], action=MERGE)
    beyond = [name for name in _BEYOND if config.get(name)]
    if beyond:
        raise EdgetuneError("this adapter is more than LoRA", got=beyond, action=MERGE)


def _read_factors(file: Path, config: Mapping[str, Any], model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    safetensors = require("safetensors.torch", "lora")
    try:
        state: dict[str, Tensor] = safetensors.load_file(file)
    except Exception as error:  # the reader's own errors
        raise EdgetuneError(f"{file.name} cannot be read: {error}", action="save the adapter anew") from error
    state = {key.removeprefix(PREFIX): value.float() for key, value in state.items()}
    endings = (".lora_A.weight", ".lora_B.weight")
    strange = sorted(key for key in state if not key.endswith(endings))
    if strange:
        embeddings = [key for key in strange if ".lora_embedding_" in key]
        problem = "an adapter on an embedding is no product with its input" if embeddings else "a tensor is no LoRA's"
        raise EdgetuneError(problem, got=strange[0], action=MERGE)
    names = sorted({key[: -len(endings[0])] for key in state})
    if not names:
        raise EdgetuneError("the adapter has no tensors", action="save it after training")
    modules = dict(model.named_modules())
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        pair = tuple(state.get(name + ending) for ending in endings)
        factors[name] = _check_pair(name, modules.get(name), pair, modules)
        scale = _scale(config, name, factors[name][0].shape[0])
        factors[name] = factors[name][0].contiguous(), (scale * factors[name][1]).contiguous()
    return factors


def _check_pair(
    name: str, layer: nn.Module | None, pair: Iterable[Tensor | None], modules: Mapping[str, nn.Module]
) -> tuple[Tensor, Tensor]:
    """A and B of a layer. Raises unless they fit it."""
    if layer is None:
        linears = [other for other, module in modules.items() if linear_widths(module) is not None]
        raise no_match_error("the adapter is for another base, which has a layer that this one lacks", name, linears)
    widths = linear_widths(layer)
    if widths is None:
        raise EdgetuneError(
            f"{name} is no linear layer, and a side path of two products fits no other",
            got=type(layer).__name__,
            action=MERGE,
        )
    a, b = pair
    if a is None or b is None:
        raise EdgetuneError(f"{name} has only one of its two matrices", action="save the adapter anew")
    inputs, outputs = widths
    rank = a.shape[0]
    if (a.dim(), b.dim()) != (2, 2) or a.shape[1] != inputs or b.shape != (outputs, rank):
        raise EdgetuneError(
            f"{name}: the adapter's matrices do not fit the layer",
            got=[tuple(a.shape), tuple(b.shape)],
            allowed=[f"({rank}, {inputs})", f"({outputs}, {rank})"],
            action="give the base that the adapter was trained on",
        )
    if rank > min(inputs, outputs):
        raise EdgetuneError(
            f"{name}: the rank is above the layer's width, so the adapter is larger than the layer",
            got=rank,
            allowed=[f"at most {min(inputs, outputs)}"],
            action=MERGE,
        )
    for tensor, letter in ((a, "A"), (b, "B")):
        if not bool(torch.isfinite(tensor).all()):
            raise EdgetuneError(
                f"{name}: lora_{letter} has values that are NaN or infinite",
                action="take a checkpoint from before the training diverged",
            )
    return a, b


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / rank, or with rslora alpha / sqrt(rank); a pattern may give the layer an alpha of its own."""
    keys = require("peft.utils.other", "lora")
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(keys.get_pattern_key(patterns, name), config.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
