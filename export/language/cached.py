"""A transformers decoder with a static cache inside: tokens and their position in, logits out.

Attention is ExecuTorch's operator over a static cache: it reads only the filled part, with grouped heads.
transformers' own `TorchExportableModuleForDecoderOnlyLM` attends to the whole cache at each token, and returns the
logits of every token of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.capture.narrow import TORCH_DTYPES
from edgetune.core.errors import EdgetuneError, Exit, truncate_list
from edgetune.core.floats import KEY_VALUE_TYPES, KeyValueType
from edgetune.core.inputs import cache_argument
from edgetune.core.registry import require
from edgetune.export.lower import check_finalized
from edgetune.quant.blocks import unpack_by_rows

_NAME = "edgetune-static-cache"
_STORED = {kind: torch.int8 if kind == "int8" else TORCH_DTYPES[kind] for kind in KEY_VALUE_TYPES}
_PARTS = ("zero", "scale")  # in the order of the operator's arguments


class CachedDecoder(nn.Module):
    """The model with a cache of `max_tokens` positions for one sequence, `(1, position, key-value head, width)`.

    An int8 cache has a scale and a zero point for each head of each position, and attention multiplies integers.

    Layers may have different numbers of heads, as pruned ones do: they are recorded while the model reads one token.
    """

    def __init__(self, model: nn.Module, max_tokens: int, cache_dtype: KeyValueType = "fp32") -> None:
        super().__init__()
        self.model = model
        self.max_tokens = max_tokens
        self.cache_dtype = cache_dtype
        config: Any = model.config
        self.config = config.get_text_config()
        self.start: Any = 0
        self.masks: dict[int, Tensor] = {}
        check_layers(self.config)
        for layer, shapes in enumerate(_record_shapes(model, self.config)):
            for kind, (heads, width) in zip(("key", "value"), shapes, strict=True):
                size = (1, max_tokens, heads)
                self.register_buffer(f"{kind}_{layer}", torch.zeros(*size, width, dtype=_STORED[cache_dtype]))
                if cache_dtype == "int8":
                    self.register_buffer(f"{kind}_{layer}_scale", torch.ones(*size, 1))
                    self.register_buffer(f"{kind}_{layer}_zero", torch.zeros(*size, 1, dtype=torch.int8))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return sum(b.numel() * b.element_size() for name, b in self.named_buffers(recurse=False))

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Logits `(1, 1, vocabulary)` after the last of `tokens` `(1, n)`; the first one is at `position` `(1,)`."""
        count = tokens.shape[1]
        start = position[0].item()
        torch._check(start >= 0)  # type: ignore[no-untyped-call]
        torch._check(start < self.max_tokens)  # type: ignore[no-untyped-call]
        torch._check(start + count <= self.max_tokens)  # type: ignore[no-untyped-call]
        self.start, self.masks = start, {}
        positions = (torch.arange(count) + start).unsqueeze(0)
        cache = {cache_argument(self.model): self._cache()}
        output = self.model(input_ids=tokens, position_ids=positions, use_cache=True, logits_to_keep=1, **cache)
        logits: Tensor = output.logits
        return logits

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,  # transformers passes further arguments, which do not change the result
    ) -> tuple[Tensor, None]:
        """The attention function for transformers. `query` (1, head, n, width); `key` and `value` are the caches."""
        if softcap is not None or s_aux is not None:
            feature = "attention logits with a cap" if softcap is not None else "attention with sinks"
            raise EdgetuneError(f"the attention operator does not support {feature}", exit_code=Exit.EXPORT)
        mask = None
        if sliding_window is not None and sliding_window < self.max_tokens:
            mask = self._window(sliding_window, query.shape[2])
        rows, settings = query.transpose(1, 2), (self.start, mask, 0.0, mask is None, scaling)
        if self.cache_dtype == "int8":
            quantized, scale, zero = quantize_rows(rows)
            scales = [
                getattr(self, f"{kind}_{module.layer_idx}_{part}") for kind in ("key", "value") for part in _PARTS
            ]
            out = torch.ops.llama.custom_quantized_sdpa(quantized, key, value, *settings, zero, scale, *scales, False)
        else:
            out = torch.ops.llama.custom_sdpa(rows.to(key.dtype), key, value, *settings)
        return out.to(query.dtype), None

    def store(self, name: str, states: Tensor) -> None:
        """Write keys or values `(1, head, n, width)` into their cache, in its type."""
        cache, rows = getattr(self, name), states.transpose(1, 2)
        if self.cache_dtype != "int8":
            torch.ops.llama.update_cache(rows.to(cache.dtype), cache, self.start)
            return
        quantized, scale, zero = quantize_rows(rows)
        torch.ops.llama.update_cache(quantized, cache, self.start)
        torch.ops.llama.update_cache(scale, getattr(self, f"{name}_scale"), self.start)
        torch.ops.llama.update_cache(zero, getattr(self, f"{name}_zero"), self.start)

    def _window(self, width: int, count: int) -> Tensor:
        """`(n, max_tokens)`: 0 for the last `width` positions up to each token, elsewhere half the lowest number.

        Not -inf: the operator processes the cache in blocks, and a fully masked block would give NaN.
        """
        if width not in self.masks:
            queries = (torch.arange(count) + self.start).unsqueeze(1)
            keys = torch.arange(self.max_tokens).unsqueeze(0)
            visible = (keys <= queries) & (keys > queries - width)
            self.masks[width] = torch.where(visible, 0.0, torch.finfo(torch.float32).min / 2)
        return self.masks[width]

    def _cache(self) -> Any:
        from transformers.cache_utils import Cache, CacheLayerMixin

        owner = self

        class StaticCacheLayer(CacheLayerMixin):  # type: ignore[misc]
            """One layer's cache, updated in place."""

            is_compileable, is_sliding = True, False

            def __init__(self, index: int) -> None:
                super().__init__()
                self.index = index
                self.keys = getattr(owner, f"key_{index}")
                self.values = getattr(owner, f"value_{index}")
                self.is_initialized = True

            def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

            def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
                owner.store(f"key_{self.index}", key_states)
                owner.store(f"value_{self.index}", value_states)
                return self.keys, self.values

            def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
                return owner.max_tokens, 0

            def get_seq_length(self) -> Any:
                return owner.start

            def get_max_length(self) -> int:
                return owner.max_tokens

        return Cache(layers=[StaticCacheLayer(index) for index in range(self.config.num_hidden_layers)])

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Inside, the model uses `attend`, and builds no masks."""
        try:
            with _replace_attention(self.config, self.attend):
                yield
        finally:
            self.start, self.masks = 0, {}


@contextmanager
def _replace_attention(config: Any, attend: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Inside, models with this config use `attend` for attention, and build no masks."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(_NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, lambda *_, **__: None)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS._global_mapping[_NAME]
        del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[_NAME]


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 values of `(1, n, head, width)`, with the scale in fp32 and the zero point in int8 of each head of a row."""
    operators = torch.ops.quantized_decomposed
    wide = rows.float()
    scale, zero = operators.choose_qparams_per_token_asymmetric(wide, torch.int8)
    return operators.quantize_per_token(wide, scale, zero, -128, 127, torch.int8), scale.float(), zero.to(torch.int8)


Shape = tuple[int, int]  # key-value heads, and their width


def _record_shapes(model: nn.Module, config: Any) -> list[tuple[Shape, Shape]]:
    """The shapes of each layer's keys and values, recorded while the model reads one token.

    Raises `EdgetuneError` for layers whose attention cannot be replaced: those with custom code.
    """
    shapes: dict[int, tuple[Shape, Shape]] = {}

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        index: Any = getattr(module, "layer_idx", len(shapes))
        shapes[index] = ((key.shape[1], key.shape[3]), (value.shape[1], value.shape[3]))
        # attention to a single token gives its value
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2), None

    body: Any = model.base_model  # without the head, the largest layer
    with torch.no_grad(), unpack_by_rows(body), _replace_attention(config, record):
        body(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    layers = range(config.num_hidden_layers)
    missing = [str(layer) for layer in layers if layer not in shapes]
    if missing:
        raise EdgetuneError(
            f"the attention of {type(model).__name__} is custom code that cannot use a static cache",
            got=f"layers {truncate_list(missing)} of {len(layers)}",
            action="export its logits for a window of tokens: et.export(model, example_inputs, path)",
            exit_code=Exit.EXPORT,
        )
    return [shapes[layer] for layer in layers]


def check_layers(config: Any) -> None:
    """Raise for a model with layers that do not have their own keys and values."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    unsupported = sorted(kinds - {"full_attention", "sliding_attention"})
    shared: int = getattr(config, "num_kv_shared_layers", 0)
    if unsupported or shared:
        raise EdgetuneError(
            "a static cache has one key and one value for each layer; this model has other layers",
            got=unsupported or "layers that share a cache",
            allowed=["full_attention", "sliding_attention"],
            action="export its logits for a window of tokens: et.export(model, example_inputs, path)",
            exit_code=Exit.EXPORT,
        )


def check_model(model: nn.Module, max_tokens: int) -> None:
    """Raise unless the model is a decoder of transformers with room for `max_tokens`."""
    transformers = require("transformers", "language models")
    if not isinstance(model, transformers.PreTrainedModel) or model.get_output_embeddings() is None:
        raise EdgetuneError(
            "a language model must be a transformers model with a head over its vocabulary",
            got=type(model).__name__,
            action="load it with AutoModelForCausalLM",
            exit_code=Exit.EXPORT,
        )
    check_finalized(model)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if max_tokens < 2 or (room is not None and max_tokens > room):
        raise EdgetuneError(
            "the cache must have at least 2 positions, and at most as many as the model",
            got=max_tokens,
            action=f"set max_tokens to at most {room}" if room is not None else "set max_tokens to 2 or more",
            exit_code=Exit.EXPORT,
        )
