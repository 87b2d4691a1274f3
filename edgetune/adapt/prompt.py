"""Prompt tuning, p-tuning and prefix tuning: a few trained vectors before the text, made by peft's encoders.

Lester et al., 2021, arXiv:2104.08691; Liu et al., 2021, arXiv:2103.10385; Li and Liang, 2021, arXiv:2101.00190.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from edgetune.adapt.files import write_adapter
from edgetune.adapt.frozen_base import freeze_base, restore_base
from edgetune.adapt.virtual_tokens import VirtualTokens
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import cache_argument, device_of, takes_argument
from edgetune.core.quiet import silence_libraries
from edgetune.core.registry import require
from edgetune.core.technique import Sample, Technique
from edgetune.core.traits import Trait

_ENCODER_WIDTH = 128


class Prompt(Technique):
    """Train a few vectors before the text of a model of transformers; the model stays frozen.

    `prompt` are vectors before the embeddings, `p-tuning` the same from a small network, and `prefix` keys and values
    before those of every attention of a decoder. The outputs are those of the text alone. After training the vectors
    are constants, a child `prompt` of the model, which takes the same inputs as before; the network is dropped. Layers
    that an earlier sparse-update chose train as well. A text-generation program is not possible with a prompt.
    """

    name: ClassVar[str] = "prompt"
    takes: ClassVar[Trait] = Trait.FROZEN | Trait.PACKED | Trait.LEAN
    leaves: ClassVar[Trait] = Trait.ADAPTED
    continues: ClassVar[bool] = False

    kind: Literal["prompt", "p-tuning", "prefix"] = "prompt"
    """What is trained."""
    tokens: int = Field(8, ge=1)
    """Number of vectors; the text may be as much shorter, except for `prefix`, where only its positions move."""
    encoder_width: int | None = Field(None, ge=1)
    """Width of the network that makes the vectors while they train; `null`: 128 for `p-tuning`, else there is none."""

    @model_validator(mode="after")
    def _width_of_a_network(self) -> Prompt:
        if self.kind == "prompt" and self.encoder_width is not None:
            raise ValueError("encoder_width: only p-tuning and prefix have a network")
        return self

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Put the vectors before the model, in place."""
        self._refuse(model)
        peft, config = require("peft", "lora"), self._config(model)
        with silence_libraries():
            if self.kind == "prompt":
                encoder = peft.PromptEmbedding(config, model.get_input_embeddings())  # type: ignore[operator]
            else:
                encoder = (peft.PromptEncoder if self.kind == "p-tuning" else peft.PrefixEncoder)(config)
        freeze_base(model, self.name)
        VirtualTokens(self.tokens, self._heads(config), encoder.to(device_of(model))).put_on(model)
        return model

    def finalize(self, model: nn.Module) -> nn.Module:
        """Make the vectors constants."""
        tokens: Any = model.get_submodule("prompt")
        tokens.settle(model.get_input_embeddings().weight.dtype)  # type: ignore[operator]
        restore_base(model, self.name)
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save the vectors in `folder/adapter`, in peft's format."""
        self.save_tokens(model, folder / "adapter")

    def save_tokens(self, model: nn.Module, folder: Path) -> None:
        """Save the vectors in `folder`, in peft's format."""
        config, tokens = self._config(model), model.get_submodule("prompt")
        config.inference_mode = True
        write_adapter(model, config, {"prompt_embeddings": tokens.current()}, folder)  # type: ignore[operator]

    @classmethod
    def load_tokens(cls, model: nn.Module, config: Any, state: Mapping[str, Tensor]) -> Prompt:
        """Put vectors on the model, in place, that train without a network; from the config and tensors of a file."""
        kind = "prefix" if config.peft_type == "PREFIX_TUNING" else "prompt"
        technique = cls.model_validate({"kind": kind, "tokens": config.num_virtual_tokens})
        technique._refuse(model)
        own, vectors = technique._config(model), state.get("prompt_embeddings", torch.empty(0))
        shape = technique.tokens, own.token_dim * (2 * own.num_layers if kind == "prefix" else 1)
        if vectors.shape != shape or len(state) > 1:
            others = sorted(state.keys() - {"prompt_embeddings"})
            raise EdgetuneError(
                "the vectors do not fit this model", got=others or tuple(vectors.shape), allowed=[str(shape)], near="",
                action="give the model that they were trained for, and a file with nothing else",
            )  # fmt: skip
        freeze_base(model, cls.name)
        encoder = nn.Embedding.from_pretrained(vectors.float().to(device_of(model)), freeze=False)  # type: ignore[no-untyped-call]
        VirtualTokens(technique.tokens, technique._heads(own), encoder).put_on(model)
        return technique

    def rebuild(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """The vectors in `state`, as constants."""
        VirtualTokens(self.tokens, self._heads(self._config(model)), None, state["prompt.vectors"]).put_on(model)
        return model

    def _config(self, model: Any) -> Any:
        """peft's config of the vectors for this model."""
        peft, text = require("peft", "lora"), model.config.get_text_config()
        heads = text.num_attention_heads
        shape: dict[str, Any] = {
            "num_virtual_tokens": self.tokens, "num_transformer_submodules": 1, "num_layers": text.num_hidden_layers,
            "token_dim": text.hidden_size, "num_attention_heads": heads,
        }  # fmt: skip
        if self.kind == "prompt":
            return peft.PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **shape)
        if self.kind == "p-tuning":
            return peft.PromptEncoderConfig(encoder_hidden_size=self.encoder_width or _ENCODER_WIDTH, **shape)
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        key_heads = getattr(text, "num_key_value_heads", None) or heads
        shape |= {"num_attention_heads": key_heads, "token_dim": key_heads * size}
        return peft.PrefixTuningConfig(
            prefix_projection=self.encoder_width is not None,
            encoder_hidden_size=self.encoder_width or shape["token_dim"],
            **shape,
        )

    def _heads(self, config: Any) -> int:
        return config.num_attention_heads if self.kind == "prefix" else 0

    def _refuse(self, model: Any) -> None:
        if not (hasattr(model, "get_input_embeddings") and hasattr(getattr(model, "config", None), "get_text_config")):
            action = "give a model of transformers, such as AutoModelForCausalLM"
            raise EdgetuneError(
                "a prompt needs a model that states its embeddings", got=type(model).__name__, action=action
            )
        if hasattr(model, "prompt"):
            raise EdgetuneError("the model has a prompt already", got=type(model).__name__, action="leave one out")
        if self.kind == "prefix" and not takes_argument(model, cache_argument(model)):
            message = "a prefix needs a decoder, which takes keys and values"
            raise EdgetuneError(message, got=type(model).__name__, action="use kind: prompt or p-tuning")
