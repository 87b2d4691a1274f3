"""A guard on disk: one `.safetensors` file with its paths, its head, its settings and the digest of its base."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgetune.adapt.guarded import GuardedModel
from edgetune.core.apply import apply
from edgetune.core.errors import EdgetuneError
from edgetune.core.files import replace_files
from edgetune.core.registry import require, technique_class

_FORMAT = "edgetune guard 1"
_PARTS = ("paths", "head")  # of a `GuardedModel`


def save_guard(model: nn.Module, path: str | Path) -> Path:
    """Write the guard of `et.apply(model, et.LoRAGuard(...))` to one small `.safetensors` file. Returns its path."""
    path = Path(path)
    if not isinstance(model, GuardedModel):
        action = "give the module that et.apply(model, et.LoRAGuard(...)) returned"
        raise EdgetuneError("the model has no guard", got=type(model).__name__, action=action)
    states = {part: model.get_submodule(part).state_dict() for part in _PARTS}
    tensors = {f"{part}.{key}": value.cpu().contiguous() for part in _PARTS for key, value in states[part].items()}
    metadata = {"format": _FORMAT, "settings": model.settings.model_dump_json(), "base": _digest(model.base)}
    with replace_files(path) as (temporary,):
        require("safetensors.torch", "lora").save_file(tensors, temporary, metadata=metadata)
    return path


def load_guard(model: nn.Module, path: str | Path) -> nn.Module:
    """The language model `model` as the base of the guard that `save_guard` wrote to `path`.

    Raises `EdgetuneError` for a file of another kind, and unless every value of the model is that of the guard's base.
    """
    path = Path(path)
    try:
        with require("safetensors", "lora").safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # the reader's own errors
        raise EdgetuneError(f"the guard cannot be read: {error}", where=str(path), action="save it anew") from error
    if metadata.get("format") != _FORMAT:
        raise EdgetuneError("the file holds no guard", where=str(path), action="give a file of et.save_guard")
    if metadata["base"] != _digest(model):
        raise EdgetuneError(
            "the guard was trained on another base, and its scores would mean nothing on this one",
            where=str(path),
            action="load the model with the weights, the type and the layers that it had then",
        )
    guarded = apply(model, technique_class("lora_guard").model_validate_json(metadata["settings"]))
    for part in _PARTS:
        state = {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
        guarded.get_submodule(part).load_state_dict(state)
    return guarded


def _digest(base: nn.Module) -> str:
    """SHA-256 of the names, shapes, types and values of all tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(base.state_dict().items()):
        plain: Any = value.detach().cpu().contiguous()
        if type(plain).__module__.startswith("torchao"):
            action = "save or load the guard first, and quantize then"
            raise EdgetuneError("the base of a guard is not quantized yet", got=name, action=action)
        digest.update(f"{name} {tuple(plain.shape)} {plain.dtype}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
