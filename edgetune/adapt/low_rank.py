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

from edgetune.adapt.deltas import read_deltas
from edgetune.adapt.factorize import Pair, factorize, relative_error, to_matrix
from edgetune.adapt.families import peft_types
from edgetune.adapt.files import CONFIG, PREFIX, WEIGHTS
from edgetune.adapt.layer_kinds import kind_of, widths_of
from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import no_match_error
from edgetune.core.registry import require

MERGE = "merge it instead: et.finalize(et.load_adapter(model, folder)), and export the result"
PICKLED = "adapter_model.bin"
ENDINGS = (".lora_A.weight", ".lora_B.weight")
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
    factors: Mapping[str, Pair]
    family: str = "LORA"  # peft's name of what it was
    error: float = 0.0  # of what it adds to the weights, relative to what the adapter of that family adds

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(a.shape[0] for a, _ in self.factors.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return sum(4 * (a.numel() + b.numel()) for a, b in self.factors.values())


def read_low_rank(name: str, folder: str | Path, model: nn.Module, rank: int | None = None) -> LowRank:
    """The adapter in `folder`, in peft's format, for the layers of the plain base `model`, which stays as it is.

    One of another family, and DoRA, becomes the nearest LoRA of `rank`, by default within 1 %. Raises `EdgetuneError`
    for an adapter that two products beside each layer cannot represent, or that does not fit.
    """
    folder = Path(folder)
    try:
        config, state = read_files(folder)
        if config.get("modules_to_save"):
            raise EdgetuneError(
                "the adapter has layers that were trained whole, which no side path can hold",
                got=config["modules_to_save"],
                action=f"put those layers into the base, or {MERGE}",
            )
        if is_convertible(config):
            return _convert(name, folder, model, rank, "DORA" if config.get("use_dora") else str(config["peft_type"]))
        problem = beyond_low_rank(config)
        if problem is not None:
            raise problem
        return LowRank(name, factors_of(state, config, model))
    except EdgetuneError as error:
        raise error.within(f"adapter {name} ({folder})") from error.__cause__


def linear_widths(layer: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer; `None` for a layer of another kind."""
    return widths_of(layer) if kind_of(layer) in ("linear", "Conv1D") else None


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config of the adapter in `folder`, and its tensors in fp32 by their names in the base."""
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
    try:
        state: dict[str, Tensor] = require("safetensors.torch", "lora").load_file(folder / WEIGHTS)
    except Exception as error:  # the reader's own errors
        raise EdgetuneError(f"{WEIGHTS} cannot be read: {error}", action="save the adapter anew") from error
    return dict(config), {key.removeprefix(PREFIX): value.float() for key, value in state.items()}


def is_convertible(config: Mapping[str, Any]) -> bool:
    """Whether it is an adapter of weights that is no plain LoRA, but can be approximated by one."""
    return config.get("peft_type") in peft_types()[1:] or bool(config.get("use_dora"))


def beyond_low_rank(config: Mapping[str, Any]) -> EdgetuneError | None:
    """The error for an adapter that is more than a low-rank product beside each layer; `None` for one that is not."""
    family = config.get("peft_type")
    if family != "LORA":
        return EdgetuneError(
            "no adapter of this family runs beside a base as two products", got=family, allowed=peft_types(), near=""
        )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGE_THE_BASE):
        return EdgetuneError(
            "the adapter began by changing the weights of its base, and does not fit the plain one",
            got=f"init_lora_weights: {start}",
            action="save it with peft's path_initial_model_for_weight_conversion, or merge it",
        )
    if config.get("bias", "none") != "none":
        return EdgetuneError("the adapter also trained biases of the base", got=config["bias"], action=MERGE)
    beyond = [name for name in _BEYOND if config.get(name)]
    return EdgetuneError("this adapter is more than LoRA", got=beyond, action=MERGE) if beyond else None


def _convert(name: str, folder: Path, model: nn.Module, rank: int | None, family: str) -> LowRank:
    """The nearest LoRA to an adapter of another family."""
    quantized = next((n for n, p in model.named_parameters() if type(p.data) is not Tensor), None)
    if quantized is not None:
        raise EdgetuneError(
            f"{family} becomes a LoRA beside the base in floating point, and this one is quantized",
            got=quantized,
            action="convert it before: et.combine_adapters(base, [folder], out), and export with that folder",
        )
    deltas, matrices = read_deltas(folder, model), {}
    for key, delta in deltas.tensors.items():
        layer = model.get_submodule(key.rpartition(".")[0])
        if linear_widths(layer) is None or not key.endswith(".weight"):
            message = f"{family} changes {key}, and two products beside a linear layer change its weight alone"
            raise EdgetuneError(message, got=type(layer).__name__, action=MERGE)
        matrices[key.removesuffix(".weight")] = to_matrix(layer, delta)
    layers = {key: model.get_submodule(key) for key in matrices}
    factors = factorize(layers, matrices, rank, "adapter_rank")
    return LowRank(name, factors, family, relative_error(matrices, factors))


def factors_of(state: Mapping[str, Tensor], config: Mapping[str, Any], model: nn.Module) -> dict[str, Pair]:
    """By layer of `model`, A and B with the adapter's scale. Raises for tensors of another kind, or that do not fit."""
    strange = sorted(key for key in state if not key.endswith(ENDINGS))
    if strange:
        embeddings = [key for key in strange if ".lora_embedding_" in key]
        problem = "an adapter on an embedding is no product with its input" if embeddings else "a tensor is no LoRA's"
        raise EdgetuneError(problem, got=strange[0], action=MERGE)
    names = sorted({key[: -len(ENDINGS[0])] for key in state})
    if not names:
        raise EdgetuneError("the adapter has no tensors", action="save it after training")
    modules = dict(model.named_modules())
    factors: dict[str, Pair] = {}
    for name in names:
        pair = tuple(state.get(name + ending) for ending in ENDINGS)
        factors[name] = _check_pair(name, modules.get(name), pair, modules)
        scale = _scale(config, name, factors[name][0].shape[0])
        factors[name] = factors[name][0].contiguous(), (scale * factors[name][1]).contiguous()
    return factors


def _check_pair(
    name: str, layer: nn.Module | None, pair: Iterable[Tensor | None], modules: Mapping[str, nn.Module]
) -> Pair:
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
