"""Tiny language models of transformers' families."""

from __future__ import annotations

import torch
from torch import nn

_SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 64, "vocab_size": 48, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip


def family(name: str, **settings: object) -> nn.Module:
    """A model of transformers whose norms and biases are random, so that moving them matters."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**_SIZES, **settings)
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                parameter.add_(torch.rand_like(parameter))
    return model
