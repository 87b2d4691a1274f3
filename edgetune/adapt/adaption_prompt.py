"""LLaMA-Adapter: in the last blocks, tokens of their own that every token attends to, through a gate that begins shut.

Zhang et al., 2023, arXiv:2303.16199, section 3.2: `attention(x) + g softmax(Q K_P' / sqrt(d)) V_P` before the output
projection, where K_P and V_P are the block's own projections of a trained prompt; peft's adaption prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from edgetune.adapt.adapter import Depth, last_blocks
from edgetune.adapt.files import PREFIX, write_adapter
from edgetune.adapt.frozen_base import freeze_base, restore_base
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import device_of
from edgetune.core.registry import require
from edgetune.core.technique import Sample, Technique
from edgetune.core.traits import Trait
from edgetune.lean.stages import blocks_of

_CHILD = "adaption"  # of a block's attention
_ARCHITECTURES = ("llama", "mistral")  # those of peft's whose queries are a projection, rotated


class AdaptionTokens(nn.Module):
    """Tokens that one attention also reads: a trained `prompt` `(1, tokens, width)` with its `gate`, then constants.

    The constants are `keys` and `values` `(1, key heads, tokens, head width)`, the gate in the values.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(1, count, width))
        self.gate = nn.Parameter(torch.zeros(1))

    def put_on(self, attention: nn.Module) -> None:
        """Become a child of an attention that adds to its output."""
        attention.add_module(_CHILD, self.train(attention.training))
        attention.register_forward_hook(self.add_to, with_kwargs=True)

    def keys_and_values(self, attention: Any) -> tuple[Tensor, Tensor]:
        """Of the tokens, in this attention."""
        if "keys" in self._buffers:
            return self.keys, self.values  # type: ignore[return-value]
        keys, values = (
            linear(self.prompt.to(_dtype(linear))).view(1, self.prompt.shape[1], -1, attention.head_dim).transpose(1, 2)
            for linear in (attention.k_proj, attention.v_proj)
        )
        return keys, self.gate.to(values.dtype) * values

    @torch.no_grad()
    def settle(self, attention: nn.Module) -> None:
        """Make the tokens constants."""
        keys, values = self.keys_and_values(attention)
        del self.prompt, self.gate
        self.set_constants(keys.clone(), values.clone())

    def set_constants(self, keys: Tensor, values: Tensor) -> None:
        """Hold these in place of a prompt."""
        self.register_buffer("keys", keys)
        self.register_buffer("values", values)

    def add_to(self, attention: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """The attention's output `(rows, length, width)`, with what its tokens read from these."""
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        query = attention.q_proj(x).view(*x.shape[:2], -1, attention.head_dim).transpose(1, 2)
        cos, sin = (one.unsqueeze(1) for one in kwargs["position_embeddings"])
        half = attention.head_dim // 2
        query = query * cos + torch.cat([-query[..., half:], query[..., :half]], -1) * sin
        keys, values = (
            one.to(query.dtype).repeat_interleave(query.shape[1] // one.shape[1], dim=1)
            for one in self.keys_and_values(attention)
        )
        scores = torch.softmax(query @ keys.transpose(2, 3) / math.sqrt(attention.head_dim), -1, torch.float32)
        added = (scores.to(query.dtype) @ values).transpose(1, 2).reshape(*x.shape[:2], -1)
        return (output[0] + attention.o_proj(added), *output[1:])


def _dtype(layer: Any) -> torch.dtype:
    """The type that a linear layer, plain or 4-bit, takes and returns."""
    dtype: torch.dtype = getattr(layer, "plain_dtype", layer.weight.dtype)
    return dtype


class AdaptionPrompt(Technique):
    """Train a few tokens for each of the last blocks, which all tokens there attend to; the model stays frozen.

    For Llama and Mistral. A gate begins at zero, so nothing changes at the start. After training, keys and values of
    the tokens are constants of each attention, in a child `adaption`, and the model takes the same inputs as before;
    text-generation programs are possible. Layers that an earlier sparse-update chose train as well.
    """

    name: ClassVar[str] = "adaption-prompt"
    takes: ClassVar[Trait] = Trait.FROZEN | Trait.PACKED
    leaves: ClassVar[Trait] = Trait.ADAPTED
    exact: ClassVar[bool] = True

    tokens: int = Field(8, ge=1)
    """Number of tokens in each block."""
    depth: Depth | None = None
    """Only the last blocks, `last-4` or a share of the blocks, so that backward ends there; by default all."""

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Put the tokens in, in place."""
        attentions = self._attentions(model)
        freeze_base(model, self.name)
        for attention in attentions.values():
            tokens = AdaptionTokens(self.tokens, attention.config.hidden_size)
            tokens.to(device_of(attention)).put_on(attention)
        return model

    def finalize(self, model: nn.Module) -> nn.Module:
        """Make the tokens constants."""
        for module in list(model.modules()):
            if isinstance(getattr(module, _CHILD, None), AdaptionTokens):
                module.get_submodule(_CHILD).settle(module)  # type: ignore[operator]
        restore_base(model, self.name)
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save the tokens in `folder/adapter`, in peft's format."""
        self.save_tokens(model, folder / "adapter")

    def save_tokens(self, model: nn.Module, folder: Path) -> None:
        """Save the tokens in `folder`, in peft's format."""
        layers = {n: m for n, m in model.named_modules() if isinstance(getattr(m, _CHILD, None), AdaptionTokens)}
        tensors = {
            f"{PREFIX}{name}.adaption_{part}": layer.get_submodule(_CHILD).get_parameter(part)
            for name, layer in layers.items()
            for part in ("prompt", "gate")
        }
        config = require("peft", self.name).AdaptionPromptConfig(
            adapter_len=self.tokens, adapter_layers=len(layers), target_modules="self_attn", inference_mode=True
        )
        write_adapter(model, config, tensors, folder)

    @classmethod
    def load_tokens(cls, model: nn.Module, config: Any, state: Mapping[str, Tensor]) -> AdaptionPrompt:
        """Put tokens on the model, in place, that go on training; from the config and tensors of a file."""
        technique = cls(tokens=config.adapter_len, depth=f"last-{config.adapter_layers}")
        names = list(technique._attentions(model))
        expected = {f"{PREFIX}{name}.adaption_{part}" for name in names for part in ("prompt", "gate")}
        width = model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
        odd = sorted(expected ^ set(state)) or [k for k, v in state.items() if v.dim() == 3 and v.shape[2] != width]
        if odd:
            action = "give the model that they were trained for"
            raise EdgetuneError("the tokens do not fit this model", got=odd, action=action)
        technique.apply(model)
        for name in names:
            tokens = model.get_submodule(f"{name}.{_CHILD}")
            for part in ("prompt", "gate"):
                tokens.get_parameter(part).data.copy_(state[f"{PREFIX}{name}.adaption_{part}"])
        return technique

    def rebuild(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """The tokens in `state`, as constants."""
        for name, attention in self._attentions(model).items():
            tokens = AdaptionTokens(1, 1)
            del tokens.prompt, tokens.gate
            tokens.set_constants(*(state[f"{name}.{_CHILD}.{part}"] for part in ("keys", "values")))
            tokens.put_on(attention)
        return model

    def _attentions(self, model: Any) -> dict[str, Any]:
        """By name, the attentions that get tokens. Raises for a model whose attention is another."""
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        if kind not in _ARCHITECTURES:
            raise EdgetuneError(
                "an adaption prompt is for attention as in these models of transformers", got=kind,
                allowed=_ARCHITECTURES, near="", action="use prompt with kind: prefix",
            )  # fmt: skip
        blocks = blocks_of(model) if self.depth is None else last_blocks(model, self.depth)
        attentions: dict[str, Any] = {f"{name}.self_attn": model.get_submodule(f"{name}.self_attn") for name in blocks}
        for name, attention in attentions.items():
            if hasattr(attention, _CHILD):
                raise EdgetuneError("the model has an adaption prompt already", got=name, action="leave one out")
            if attention.o_proj.bias is not None:
                message = f"{name}.o_proj has a bias, which would be added twice"
                raise EdgetuneError(message, got=kind, action="use prompt with kind: prefix")
        return attentions
