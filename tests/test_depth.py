"""Blocks are taken out of deep models: what stays computes as before, the config follows, and the cut model loads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import edgetune as et
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs
from edgetune.prune.depth import spread
from support.laws import bert, llama, logits, tokens

DECODER = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}


def gemma() -> nn.Module:
    """Its sixth block attends to everything, the others to a window."""
    config = Gemma3TextConfig(**DECODER, num_hidden_layers=6, num_key_value_heads=2, head_dim=8, pad_token_id=0)  # type: ignore[arg-type]
    return Gemma3ForCausalLM(config)


def t5(decoder_layers: int = 4) -> nn.Module:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "vocab_size": 50}
    return T5ForConditionalGeneration(T5Config(num_layers=4, num_decoder_layers=decoder_layers, **sizes))


def whisper() -> nn.Module:
    sides: dict[str, Any] = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"layers": 4, "attention_heads": 4, "ffn_dim": 64}.items()
    }
    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(d_model=32, vocab_size=50, num_mel_bins=8, max_source_positions=16, **sides, **special)
    return WhisperForConditionalGeneration(config)


def clip() -> nn.Module:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    text = {**sizes, "num_hidden_layers": 6, "vocab_size": 50}
    vision = {**sizes, "num_hidden_layers": 4, "image_size": 32, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=6, vocab_size=50))


def distilbert() -> nn.Module:
    return DistilBertForSequenceClassification(
        DistilBertConfig(dim=32, n_heads=4, hidden_dim=64, vocab_size=50, n_layers=6)
    )


def dinov2() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 6}
    return Dinov2ForImageClassification(Dinov2Config(**sizes, image_size=32, patch_size=8))


def swin() -> nn.Module:
    sizes: dict[str, Any] = {"embed_dim": 12, "depths": [2, 2, 4], "num_heads": [2, 2, 2], "window_size": 2}
    return SwinForImageClassification(SwinConfig(**sizes, image_size=32, patch_size=4))


def convnext() -> nn.Module:
    return ConvNextForImageClassification(ConvNextConfig(depths=[2, 2, 2, 2], hidden_sizes=[8, 8, 16, 16]))


def images() -> Inputs:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def pair() -> Inputs:
    return {**tokens(), "decoder_input_ids": tokens()["input_ids"]}  # type: ignore[call-overload]


def sound() -> Inputs:
    return {"input_features": torch.randn(1, 8, 32), "decoder_input_ids": torch.arange(3, 7).reshape(1, 4)}


def pixels_and_text() -> Inputs:
    return {**tokens(), "pixel_values": torch.randn(4, 3, 32, 32)}  # type: ignore[dict-item]


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs], et.Depth, dict[str, Any]]] = {
    "bert": (lambda: bert(6), tokens, et.Depth(blocks=3), {"num_hidden_layers": 3}),
    "llama": (llama, tokens, et.Depth(blocks=(1,)), {"num_hidden_layers": 1}),
    "gemma3": (
        gemma, tokens, et.Depth(blocks=2),
        {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": (gpt2, tokens, et.Depth(blocks=(0, 2, 5)), {"n_layer": 3}),
    "distilbert": (distilbert, tokens, et.Depth(blocks=2), {"n_layers": 2}),
    "t5": (t5, pair, et.Depth(blocks=2), {"num_layers": 2, "num_decoder_layers": 2}),
    "t5, unequal": (lambda: t5(3), pair, et.Depth(blocks=2), {"num_layers": 2, "num_decoder_layers": 2}),
    "t5, the decoder": (
        t5, pair, et.Depth(blocks=1, lists=("decoder.block",)), {"num_layers": 4, "num_decoder_layers": 1},
    ),
    "whisper, the decoder": (
        whisper, sound, et.Depth(blocks=2, lists=("*.decoder.layers",)), {"encoder_layers": 4, "decoder_layers": 2},
    ),
    "dinov2": (dinov2, images, et.Depth(blocks=2), {"num_hidden_layers": 2, "out_features": ["stage2"]}),
    "swin": (swin, images, et.Depth(blocks=2), {"depths": [2, 2, 2]}),
    "convnext": (convnext, images, et.Depth(blocks=1, lists=("*.stages.*.layers",)), {"depths": [1, 1, 1, 1]}),
    "clip": (clip, pixels_and_text, et.Depth(blocks=2), {}),
}  # fmt: skip


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


@pytest.mark.parametrize("name", CASES)
def test_a_shorter_model_of_transformers_is_loaded_by_plain_means(name: str, tmp_path: Path) -> None:
    build, inputs, depth, counts = CASES[name]
    model: Any = made(build)
    torch.manual_seed(1)
    given = inputs()
    before = sum(parameter.numel() for parameter in model.parameters())
    et.apply(model, depth, et.Sample.of(given))
    assert sum(parameter.numel() for parameter in model.parameters()) < before
    assert {key: getattr(model.config, key) for key in counts} == counts
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(again, given), logits(model, given))


def test_the_blocks_that_stay_compute_as_if_the_others_passed_their_inputs_on() -> None:
    model, shorter = made(lambda: bert(6)), made(lambda: bert(6))
    et.apply(shorter, et.Depth(blocks=(0, 3, 5)), et.Sample.of(tokens()))
    for position in (1, 2, 4):
        block = model.get_submodule(f"bert.encoder.layer.{position}")
        block.register_forward_hook(lambda _, args, __: args[0])
    assert torch.equal(logits(shorter, tokens()), logits(model, tokens()))
    assert not torch.equal(logits(shorter, tokens()), logits(made(lambda: bert(6)), tokens()))


def test_a_shorter_language_model_generates_with_its_cache() -> None:
    model: Any = made(lambda: gemma())
    et.apply(model, et.Depth(blocks=(1, 5)), et.Sample.of(tokens()))
    ids = tokens()["input_ids"]  # type: ignore[call-overload]
    cached = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))


def test_stages_keep_as_many_blocks_each() -> None:
    from support.timm_apart import import_timm

    model = import_timm().create_model("resnet18", num_classes=3).eval()
    images = torch.randn(2, 3, 64, 64)
    et.apply(model, et.Depth(blocks=1), et.Sample.of(images))
    assert [len(model.get_submodule(f"layer{stage}")) for stage in (1, 2, 3, 4)] == [1, 1, 1, 1]  # type: ignore[arg-type]
    assert logits(model, images).shape == (2, 3)


class Widening(nn.Module):
    """Blocks whose outputs differ in width."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 4))])

    def forward(self, values: Tensor) -> Tensor:
        for block in self.blocks:
            values = block(values)
        return values


@pytest.mark.parametrize(
    ("build", "inputs", "settings", "message"),
    [
        (bert, tokens, {"blocks": 2}, r"every block would stay: bert\.encoder\.layer has 2: got 2"),
        (bert, tokens, {"blocks": 3}, r"bert\.encoder\.layer has 2 blocks: got 3"),
        (bert, tokens, {"blocks": (0, 2)}, r"has 2 blocks: got \[0, 2\].*positions from 0 to 1"),
        (bert, tokens, {"blocks": 1, "lists": ("*.nothing",)}, r"lists: the pattern matches no list of blocks"),
        (lambda: t5(4), pair, {"blocks": (1, 2)}, r"block 0 of encoder\.block has what no block that stays has"),
        (lambda: nn.Linear(8, 8), lambda: torch.randn(2, 8), {"blocks": 1}, "the model has no repeated blocks"),
        (Widening, lambda: torch.randn(2, 8), {"blocks": (0,), "lists": ("blocks",)}, "the outputs have another shape"),
        (Widening, lambda: torch.randn(2, 8), {"blocks": (1,), "lists": ("blocks",)}, "the model does not run"),
    ],
)
def test_what_cannot_be_taken_out_is_refused_and_leaves_the_model(
    build: Callable[[], nn.Module], inputs: Callable[[], Inputs], settings: dict[str, Any], message: str
) -> None:
    model, given = made(build), inputs()
    if message == "the model does not run":
        model.blocks[1][0] = nn.Linear(4, 4)  # type: ignore[index, operator, assignment, union-attr]
        model.blocks[0][0] = nn.Linear(8, 4)  # type: ignore[index, operator, assignment, union-attr]
    before, config = logits(model, given), str(getattr(model, "config", ""))
    with pytest.raises(EdgetuneError, match=re.compile(message, re.DOTALL)):
        et.apply(model, et.Depth(**settings), et.Sample.of(given))
    assert torch.equal(logits(model, given), before)
    assert str(getattr(model, "config", "")) == config


@pytest.mark.parametrize("blocks", [0, (), (2, 1), (1, 1), (-1,), "half"])
def test_settings_that_name_no_blocks_are_refused(blocks: Any) -> None:
    with pytest.raises(EdgetuneError, match="blocks"):
        et.Depth(blocks=blocks)


def test_blocks_are_spread_from_the_first_to_the_last() -> None:
    assert [spread(kept, 12) for kept in (1, 2, 3, 6)] == [(0,), (0, 11), (0, 5, 11), (0, 2, 4, 6, 8, 11)]


def test_a_saved_model_of_a_cut_causal_class_loads_as_auto_model(tmp_path: Path) -> None:
    model: Any = et.apply(made(llama), et.Depth(blocks=1), et.Sample.of(tokens()))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens()), logits(model, tokens()))
