"""The families that pruning is held to, small and with random weights, and what each keeps of itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from edgetune.core.inputs import Inputs
from support.families import FAMILIES, LENGTH, WORDS, Family, lively, of_timm, pairs, pictures, sentences, words

TIMM = {
    "ViT": "vit_tiny_patch16_224", "DeiT": "deit_tiny_patch16_224", "BEiT": "beit_base_patch16_224",
    "Swin": "swin_tiny_patch4_window7_224", "ResNeXt": "resnext50_32x4d", "VGG": "vgg11_bn", "DenseNet": "densenet121",
    "GhostNet": "ghostnet_050", "RepVGG": "repvgg_a0", "MobileViT": "mobilevit_xxs", "ResNet50": "resnet50",
}  # fmt: skip
SIZED = ("DeiT", "BEiT", "Swin", "ViT")
SHARED = (  # with the families of the export's table
    "MobileNetV3", "MobileNetV4", "EfficientNet", "EfficientNet-Lite", "RegNet", "FastViT", "ConvNeXt-atto", "TinyViT",
    "EfficientViT (MIT)", "EfficientViT (MSRA)", "ResNet", "SHViT", "ShuffleNetV2", "SqueezeNet", "BERT", "MiniLM",
    "DistilBERT", "ModernBERT", "T5-small", "Llama", "SmolLM2", "Qwen3", "Gemma 3", "Phi", "Mixtral", "OLMoE",
    "Whisper encoder", "Whisper decoder", "CLIP", "Mamba", "pose head", "segmentation head",
)  # fmt: skip
WIDE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = {**WIDE, "vocab_size": WORDS, "max_position_embeddings": 4 * LENGTH, "pad_token_id": 0}
CAUSAL = {**TEXT, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
IMAGES = {**WIDE, "image_size": 64, "patch_size": 16}

TRANSFORMERS: dict[str, tuple[str, dict[str, Any], Callable[[int], Inputs]]] = {
    "RoBERTa": ("RobertaForSequenceClassification", TEXT, sentences),
    "ALBERT": ("AlbertForSequenceClassification", {**TEXT, "embedding_size": 32}, sentences),
    "ELECTRA": ("ElectraForSequenceClassification", {**TEXT, "embedding_size": 32}, sentences),
    "DeBERTa-v2": (
        "DebertaV2ForSequenceClassification",
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        sentences,
    ),
    "GPT-2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **CAUSAL}, words),
    "GPT-NeoX": ("GPTNeoXForCausalLM", CAUSAL, words),
    "OPT": ("OPTForCausalLM", {**CAUSAL, "ffn_dim": 128, "word_embed_proj_dim": 64}, words),
    "Qwen2": ("Qwen2ForCausalLM", {**CAUSAL, "num_key_value_heads": 2}, words),
    "Mistral": ("MistralForCausalLM", {**CAUSAL, "num_key_value_heads": 2}, words),
    "Phi-3": ("Phi3ForCausalLM", {**CAUSAL, "num_key_value_heads": 2}, words),
    "T5": (
        "T5ForConditionalGeneration",
        {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 2, "vocab_size": WORDS,
         "feed_forward_proj": "gated-gelu", "use_cache": False},
        pairs,
    ),
    "SegFormer": (
        "SegformerForImageClassification",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [32, 64],
         "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]},
        pictures,
    ),
    "ViT (transformers)": ("ViTForImageClassification", IMAGES, pictures),
    "DINOv2": ("Dinov2ForImageClassification", {**IMAGES, "mlp_ratio": 2}, pictures),
}  # fmt: skip


def _transformers(name: str) -> nn.Module:
    import transformers

    kind, settings, inputs = TRANSFORMERS[name]
    architecture = getattr(transformers, kind)
    model: nn.Module = architecture(architecture.config_class(**settings)).eval()
    return lively(model, inputs(4))


def _family(name: str) -> Family:
    if name in TRANSFORMERS:
        return Family(name, partial(_transformers, name), TRANSFORMERS[name][2], "int4", "transformers")
    if name in TIMM:
        return Family(name, partial(of_timm, TIMM[name], sized=name in SIZED), pictures, "int8", "timm")
    return FAMILIES[name]


PRUNED = {name: _family(name) for name in (*TIMM, *TRANSFORMERS, *SHARED)}


def zeroed(model: nn.Module, members: list[tuple[str, int, list[int]]]) -> nn.Module:
    """The model with these positions of weights along a dimension at zero."""
    for layer, dim, positions in members:
        weight = model.get_submodule(layer).weight
        assert isinstance(weight, torch.Tensor)
        with torch.no_grad():
            weight.index_fill_(dim, torch.tensor(positions), 0.0)
    return model
