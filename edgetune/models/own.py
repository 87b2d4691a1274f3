"""A model that the user's own function builds: `py:file.py:build`."""

from __future__ import annotations

from typing import Any

from torch import nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.own_code import PREFIX, call_own
from edgetune.data.dataset import Dataset
from edgetune.models.loaded import LoadedModel, ModelSettings, refuse_settings
from edgetune.models.text import TextEncoder
from edgetune.models.vision import ImageEncoder


def own_model(argument: str, settings: ModelSettings, dataset: Dataset) -> LoadedModel:
    """The model that `build()` or `build(classes)` returns: a module, or `(module, encode)`; `classes` are the data's.

    `encode` turns a list of rows into the model's inputs: a function, or a tokenizer of transformers. If none is given,
    images come as fp32 `(batch, image_channels, image_px, image_px)` from 0 to 1; texts need one.
    """
    source = f"{PREFIX}{argument}"
    refuse_settings(source, settings, "layers", "pretrained", "head")
    model, encode = module_of(source, call_own(source, dataset.classes))
    return LoadedModel(source, model.eval(), _encoder(source, encode, settings, dataset))


def module_of(source: str, built: Any) -> tuple[nn.Module, Any]:
    """The module and the encoder, if any, that a function returned."""
    model, encode = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module):
        raise EdgetuneError(
            f"{source} does not return a module",
            got=type(model).__name__,
            action="return an nn.Module, or (module, encode)",
        )
    return model, encode


def _encoder(source: str, encode: Any, settings: ModelSettings, dataset: Dataset) -> Any:
    if hasattr(encode, "tokenize") or hasattr(encode, "pad_token_id"):
        if encode.pad_token_id is None:
            raise EdgetuneError("the tokenizer has no padding token", action="set tokenizer.pad_token")
        return TextEncoder(encode, settings.max_length)
    if encode is not None:
        if not callable(encode):
            action = "return a function, or a transformers tokenizer"
            raise EdgetuneError(f"{source} returns an encoder that is not callable", got=encode, action=action)
        return encode
    if dataset.task.texts:
        action = "return (module, tokenizer), or (module, encode) with encode(texts, pad_to) -> tensors"
        raise EdgetuneError(f"{source} does not return an encoder from texts to model inputs", action=action)
    return ImageEncoder(settings.image_px, (0.0,) * settings.image_channels, (255.0,) * settings.image_channels)
