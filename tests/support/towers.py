"""A tiny CLIP with random weights, and pairs of images and texts for it."""

from __future__ import annotations

from typing import Any

import torch

from edgetune.core.inputs import Inputs


def clip() -> Any:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(8)
    shape = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "attention_dropout": 0.1,
    }  # fmt: skip
    text = CLIPTextConfig(
        **shape, vocab_size=48, max_position_embeddings=16, projection_dim=16, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(**shape, image_size=16, patch_size=8, projection_dim=16)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)).eval()


def pairs(count: int = 6) -> Inputs:
    draw = torch.Generator().manual_seed(9)
    ids = torch.randint(3, 48, (count, 8), generator=draw)
    ids[:, -1] = 2  # CLIP reads a text's state at its end
    images = torch.randn(count, 3, 16, 16, generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images}
