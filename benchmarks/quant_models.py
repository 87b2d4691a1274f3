"""What bench_quant.py quantizes: real models on real data, and networks that it trains from scratch.

The learning rates of the first training were chosen on validation rows: those of MiniLM, EfficientNet-Lite0 and SmolLM2
for bench_sparse.py and the recipe, the others from 3e-4, 1e-3 and 3e-3 or 1e-2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from support.timm_apart import import_timm

HERE = "py:benchmarks/quant_models.py"
IMAGES = {"source": "fashion-mnist", "train_rows": 20_000, "validation_rows": 500, "test_rows": 2000}
GPT_WORDS, GPT_TOKENS = 2048, 64


@dataclass(frozen=True)
class Task:
    """A model, its data and its training, as parts of a recipe."""

    model: dict[str, Any]
    data: dict[str, Any]
    train: tuple[dict[str, Any], ...]  # steps
    export: dict[str, Any]
    qat: dict[str, Any]  # the settings of its second training
    kind: str  # "text", "image" or "language": which methods suit it
    wide: tuple[str, ...] = ()  # linears in 8 bits wherever others have 4


TASKS = {
    "MiniLM": Task(
        model={"source": "minilm", "max_length": 64},
        data={"source": "tweets", "test_rows": 1500},
        train=({"train": {"updates": 228, "batch_size": 32, "learning_rate": 2e-4}},),
        export={"check_rows": 64}, qat={"updates": 100, "batch_size": 16, "learning_rate": 2e-5}, kind="text",
    ),
    "EfficientNet-Lite0": Task(
        model={"source": "effnet-lite0", "image_px": 96},
        data={**IMAGES, "train_rows": 6000},
        train=({"train": {"updates": 375, "batch_size": 32, "learning_rate": 1e-3}},),
        export={"check_rows": 64}, qat={"updates": 100, "learning_rate": 1e-4}, kind="image",
    ),
    "MobileNetV3": Task(
        model={"source": f"{HERE}:mobilenetv3", "image_px": 48},
        data=IMAGES,
        train=({"train": {"epochs": 2, "batch_size": 64, "learning_rate": 1e-2}},),
        export={"check_rows": 64}, qat={"updates": 100, "learning_rate": 1e-4}, kind="image",
    ),
    "ViT-tiny": Task(
        model={"source": f"{HERE}:vit_tiny", "image_px": 32},
        data=IMAGES,
        train=({"train": {"epochs": 2, "batch_size": 64, "learning_rate": 1e-3}},),
        export={"check_rows": 64}, qat={"updates": 100, "batch_size": 64, "learning_rate": 5e-5}, kind="text",
    ),
    "small GPT": Task(
        model={"source": f"{HERE}:small_gpt", "max_length": GPT_TOKENS},
        data={"source": "conversations"},
        train=({"train": {"epochs": 6, "batch_size": 16, "learning_rate": 1e-3}},),
        export={"language": True, "max_tokens": 128, "min_same_prediction_pct": 0},
        qat={"epochs": 2, "batch_size": 16, "learning_rate": 1e-4}, kind="language",
    ),
    "SmolLM2": Task(  # its weights are 4-bit values already: a degraded baseline
        model={"source": "smollm2", "max_length": 64},
        data={"source": "conversations"},
        train=(
            {"lora": {"rank": 8, "targets": ["*.q_proj", "*.v_proj"]}},
            {"train": {"epochs": 1, "batch_size": 8, "learning_rate": 5e-4}},
        ),
        export={"language": True, "max_tokens": 512, "min_same_prediction_pct": 0},
        qat={"updates": 40, "batch_size": 8, "learning_rate": 5e-5}, kind="language", wide=("lm_head", "*.down_proj"),
    ),
}  # fmt: skip


def mobilenetv3(classes: list[str]) -> nn.Module:
    """Small, from scratch."""
    model: nn.Module = import_timm().create_model("mobilenetv3_small_100", num_classes=len(classes))
    return model


def vit_tiny(classes: list[str]) -> nn.Module:
    """12 blocks of 192, from scratch, with 16 patches."""
    model: nn.Module = import_timm().create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=len(classes)
    )
    return model


def small_gpt() -> tuple[nn.Module, Any]:
    """A Llama of 6 blocks of 256 with random weights, and a tokenizer of 2,048 words from the training rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    config = LlamaConfig(
        hidden_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, intermediate_size=704,
        vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True, use_cache=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from edgetune.core import registry
    from edgetune.data.settings import DataSettings

    data = registry.loader(registry.DATASETS, "data", "conversations")(DataSettings(source="conversations"))
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=GPT_WORDS, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    words.train_from_iterator(data.train.inputs, trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ bos_token + message['role'] + '\n' + message['content'] + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"
    )
    return tokenizer
