"""Models to prune, and what the same model says with the planned units at zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgetune.prune.structured import Prune

TOKENS = torch.arange(12).reshape(2, 6)


def bert(**settings: object) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = BertConfig(vocab_size=50, max_position_embeddings=16, num_labels=3, **{**sizes, **settings})
    return BertForSequenceClassification(config).eval()


def bert_inputs() -> dict[str, Tensor]:
    return {"input_ids": TOKENS, "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}


def llama(heads: int = 6, kv_heads: int = 3) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=8,
        intermediate_size=40,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def by_weight(**settings: Any) -> Prune:
    """Pruning that drops units to zero: by activations they go to their mean."""
    return Prune(importance="magnitude", **settings)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
