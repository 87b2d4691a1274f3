"""A model's inputs and outputs in any form: a tensor, a tuple, a mapping."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Union

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError

_LOGITS = ("logits", "logits_per_image", "logits_per_audio")  # of one tower, or of two, by transformers' names
Inputs = Union[Tensor, "tuple[Tensor, ...]", "dict[str, Tensor]"]


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Run `model` on inputs of any of the three forms."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: a tensor, the value named `logits`, of two towers that of the pairs, or the first
    of a tuple."""
    if isinstance(output, Tensor):
        return output
    named = (output.get(name) if isinstance(output, Mapping) else getattr(output, name, None) for name in _LOGITS)
    logits = next((value for value in named if value is not None), None)
    if logits is None and isinstance(output, (tuple, list)) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise EdgetuneError(
            "the output of the model has no logits",
            got=type(output).__name__,
            action='return a tensor, a tuple that begins with one, a mapping with "logits", or an object with .logits',
        )
    return logits


def takes_argument(model: nn.Module, name: str) -> bool:
    """Whether the model's forward names this argument."""
    return name in inspect.signature(model.forward).parameters


def cache_argument(model: nn.Module) -> str:
    """The argument of a model of transformers for its cache: `cache` since 5.24, `past_key_values` before."""
    return "cache" if takes_argument(model, "cache") else "past_key_values"


def tensors_of(inputs: Inputs) -> tuple[Tensor, ...]:
    """The tensors of the inputs, in order."""
    if isinstance(inputs, Tensor):
        return (inputs,)
    return tuple(inputs.values()) if isinstance(inputs, dict) else tuple(inputs)


def tensors_in(value: object, caches: bool = False) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts; with `caches` those in a cache of transformers too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item, caches)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()), caches)
    elif caches and isinstance(layers := getattr(value, "layers", None), list):
        yield from tensors_in([(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers])


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """The inputs with `function` applied to every tensor, in the same form."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, dict):
        return {name: function(value) for name, value in inputs.items()}
    return tuple(map(function, inputs))


def rows_of(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Rows `start:stop` of every tensor, in the same form."""
    return map_tensors(lambda tensor: tensor[start:stop], inputs)


def first_rows(inputs: Inputs) -> Inputs:
    """Two rows, where every tensor has one for each example: a graph needs no more."""
    tensors = tensors_of(inputs)
    rows = {t.shape[0] if isinstance(t, Tensor) and t.dim() else 0 for t in tensors}
    return rows_of(inputs, 0, 2) if len(rows) == 1 and rows.pop() > 2 else inputs


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """The inputs on `device`, in the same form."""
    return map_tensors(lambda tensor: tensor.to(device), inputs)


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU if there is none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def token_mask(inputs: Inputs) -> Tensor | None:
    """Which tokens are not padding `(rows, tokens)`; `None`: all of them, or it is not stated."""
    mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
    return mask.bool() if mask is not None and mask.dim() == 2 else None
