"""Tiny mixtures of experts of transformers."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from edgetune.core.inputs import Inputs

SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_local_experts": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
}  # fmt: skip
DEEPSEEK = {
    **{name: size for name, size in SIZES.items() if name not in ("head_dim", "num_experts", "num_local_experts")},
    "num_key_value_heads": 2, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "first_k_dense_replace": 1,
}  # fmt: skip
IDS = torch.arange(12).view(2, 6) + 1


def ids() -> Inputs:
    return {"input_ids": IDS}


def mixture(kind: str = "Mixtral") -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**(DEEPSEEK if kind.startswith("Deepseek") else SIZES))
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():  # GPT-OSS leaves some empty
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.1)
    return model  # type: ignore[no-any-return]
