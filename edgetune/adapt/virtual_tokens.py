"""Vectors before a text, as a child of a model of transformers: peft's encoder makes them until they are constants.

They stand before the embeddings of the text, or before the keys and values of every attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import cache_argument, device_of, logits_of
from edgetune.core.registry import require

_CACHES = {"cache", "past_key_values"}  # as models call what they continue from


class VirtualTokens(nn.Module):
    """`count` tokens before every row. `heads`: of the keys and values that a prefix is; 0: vectors of embeddings.

    While it trains, `encoder` maps their numbers `(1, count)` to vectors `(1, count, width)`; then they are the buffer
    `vectors` `(count, width)`. For a prefix, `width` is `layers * 2 * heads * size`.
    """

    def __init__(self, count: int, heads: int, encoder: nn.Module | None, vectors: Tensor | None = None) -> None:
        super().__init__()
        self.count, self.heads, self.encoder = count, heads, encoder
        self.register_buffer("vectors", vectors)

    def current(self) -> Tensor:
        """The vectors `(count, width)`."""
        if self.encoder is None:
            return self.vectors  # type: ignore[return-value]
        numbers = torch.arange(self.count, device=device_of(self.encoder))
        vectors: Tensor = self.encoder(numbers.unsqueeze(0))[0]
        return vectors

    @torch.no_grad()
    def settle(self, dtype: torch.dtype) -> None:
        """Make the vectors constants, in place of the encoder."""
        self.vectors, self.encoder = self.current().to(dtype).clone(), None

    def put_on(self, model: nn.Module) -> None:
        """Become a child of the model that changes each of its calls."""
        model.add_module("prompt", self)
        model.register_forward_pre_hook(self.extend_inputs, with_kwargs=True)
        model.register_forward_hook(self.cut_outputs)

    def extend_inputs(
        self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        """The inputs by name, with the tokens before them: embeddings or a cache, mask, positions, types and labels."""
        names = list(inspect.signature(model.forward).parameters)[: len(args)]
        given = {n: v for n, v in {**dict(zip(names, args, strict=True)), **kwargs}.items() if v is not None}
        caches = _CACHES & given.keys()
        if caches:
            raise EdgetuneError(
                "a prompt stands before the first token, and this call continues a text",
                got=caches,
                action="call the model with the whole text",
            )
        text = given.pop("inputs_embeds", None)
        if text is None and not self.heads:
            text = model.get_input_embeddings()(given.pop("input_ids"))
        rows = len(text if text is not None else given["input_ids"])
        vectors = self.current().expand(rows, -1, -1)
        if self.heads:
            given |= {
                cache_argument(model): self._cache(model, vectors),
                **({} if text is None else {"inputs_embeds": text}),
            }
        else:
            given["inputs_embeds"] = torch.cat([vectors.to(text), text], 1)
        return (), given | self._extended(given)

    def _extended(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """What has one value for each token, with those of the virtual ones."""
        firsts = {"attention_mask": 1} if self.heads else {"attention_mask": 1, "token_type_ids": 0, "labels": -100}
        extended = {}
        for name, first in firsts.items():
            values = given.get(name)
            if values is not None and values.dim() == 2 and (name != "labels" or not values.is_floating_point()):
                extended[name] = torch.cat([values.new_full((len(values), self.count), first), values], 1)
        if "position_ids" in given:
            positions = given["position_ids"] + self.count
            own = torch.arange(self.count, device=positions.device).expand(len(positions), -1)
            extended["position_ids"] = positions if self.heads else torch.cat([own, positions], 1)
        return extended

    def _cache(self, model: Any, vectors: Tensor) -> Any:
        config = model.config.get_text_config()
        cache = require("transformers", "a prefix").DynamicCache(config=config)
        layers = config.num_hidden_layers
        parts = vectors.view(len(vectors), self.count, 2 * layers, self.heads, -1).permute(2, 0, 3, 1, 4)  # as peft
        parts = parts.to(model.get_input_embeddings().weight.dtype)
        for layer in range(layers):
            cache.update(parts[2 * layer], parts[2 * layer + 1], layer)
        return cache

    def cut_outputs(self, model: nn.Module, args: object, output: Any) -> Any:
        """The logits of the text alone, where each token has some, without the cache that was not asked for."""
        logits = logits_of(output)
        logits = logits if self.heads or logits.dim() != 3 else logits[:, self.count :]
        if isinstance(output, Tensor):
            return logits
        if isinstance(output, tuple):
            rest = output[1:]
            return (logits, *(value for value in rest if not self.heads or not hasattr(value, "layers")))
        return type(output)(
            **{**output, "logits": logits, **dict.fromkeys(_CACHES & output.keys() if self.heads else ())}
        )
