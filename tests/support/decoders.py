"""Small decoders of transformers with a tokenizer of bytes, and their text-generation programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgetune.core.quiet import silence_libraries
from edgetune.export.language import export_language
from edgetune.program.artifact import Artifact

with silence_libraries():  # libraries that these load warn on import
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers


VOCABULARY = 258  # every byte, and two special tokens
CACHE = 160
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}model:"


def tokenizer() -> Any:
    """Bytes as tokens."""
    vocabulary = {char: i + 2 for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    plain = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, **vocabulary}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def decoder(kind: str, **settings: Any) -> nn.Module:
    """A small decoder whose greedy text does not settle on one token."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 0,
    }  # fmt: skip
    with silence_libraries():
        config = getattr(transformers, f"{CONFIGS.get(kind, kind)}Config")(**{**shape, **settings})
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)
    return model.eval()


CONFIGS = {"Gemma3": "Gemma3Text"}
ARCHITECTURES = {
    "Llama": {"num_key_value_heads": 2, "num_hidden_layers": 1, "tie_word_embeddings": True},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 1},
    "Gemma3": {
        "num_key_value_heads": 1, "head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 32,
        "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": False,
    },
    "Phi": {"num_hidden_layers": 1},
    "Phi3": {"num_key_value_heads": 2, "num_hidden_layers": 1},
}  # fmt: skip


def llama() -> nn.Module:
    """The decoder of the `talking` program."""
    return decoder("Llama", **ARCHITECTURES["Llama"])


def export_decoder(model: nn.Module, folder: Path, **settings: Any) -> Artifact:
    """With a tokenizer that was called before, as a training calls it: cutting and filling texts."""
    fast = tokenizer()
    fast(["a text for training"], truncation=True, max_length=4)
    return export_language(model, fast, folder / "model.pte", max_tokens=CACHE, prefill_tokens=32, **settings)
