"""Adapters of plain peft for small models, and what a base computes with one, by hooks of their own."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgetune.core.quiet import silence_libraries

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_lora(
    model: nn.Module, folder: Path, targets: Sequence[str], *, seed: int, rank: int = 4, **settings: Any
) -> Path:
    """An adapter with random matrices, as peft saves it; the model stays as it is."""
    with silence_libraries():
        config = peft.LoraConfig(r=rank, target_modules=list(targets), **settings)
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        draw = torch.Generator().manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)
        adapted.save_pretrained(str(folder))
    return folder


def change(folder: Path, goal: Path, config: dict[str, Any] | None = None, **tensors: Tensor | None) -> Path:
    """A copy of an adapter with other settings, and other tensors by the end of their names (`None` takes one out)."""
    goal.mkdir()
    stored = json.loads((folder / CONFIG).read_text())
    (goal / CONFIG).write_text(json.dumps({**stored, **(config or {})}))
    state = load_file(folder / WEIGHTS)
    for ending, tensor in tensors.items():
        (name,) = [key for key in state if key.endswith(ending.replace("__", "."))]
        del state[name]
        if tensor is not None:
            state[name] = tensor
    save_file(state, goal / WEIGHTS)
    return goal


@contextmanager
def adapted(model: nn.Module, folder: Path) -> Iterator[nn.Module]:
    """Inside, the layers of the model add the adapter's low-rank product; as peft's own layers do, over any weight."""
    state, stored = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())

    def beside(a: Tensor, b: Tensor, alpha: float) -> Any:
        scale = alpha / a.shape[0] ** (0.5 if stored["use_rslora"] else 1)
        return lambda layer, args, output: output + scale * (args[0] @ a.T @ b.T)

    with ExitStack() as stack:
        for key in [key for key in state if key.endswith("lora_A.weight")]:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            own = [value for pattern, value in stored["alpha_pattern"].items() if name.endswith(pattern)]
            pair = state[key], state[key.replace("lora_A", "lora_B")]
            handle = model.get_submodule(name).register_forward_hook(beside(*pair, (own or [stored["lora_alpha"]])[0]))
            stack.callback(handle.remove)
        yield model


def peft_logits(model: nn.Module, folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    """What peft computes with the adapter over a float base."""
    with silence_libraries(), torch.no_grad():
        logits: Tensor = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()(**inputs).logits
    return logits
