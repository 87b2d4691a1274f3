"""The families of models that bench_export.py takes through the whole line: one builder each, random weights, small.

Random weights say nothing about quality; what is looked at here is shape, lowering and equal outputs. `lively` makes
them such that every parameter counts: a zero bias or a layer scale of 1e-6 could be lost without a trace.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.core.inputs import Inputs, call
from support.nets import Chela, Clip, First, Pose, SamEncoder, VoiceDetector, shared_ffn
from support.timm_apart import import_timm

CLASSES, WORDS, LENGTH, PX = 10, 128, 16, 64

Source = Literal["timm", "transformers", "here"]
Bits = Literal["int8", "int4"]


@dataclass(frozen=True)
class Family:
    """How to build one. `inputs` gives a batch of that many rows; `adapt` is `lora` or a scheme of sparse-update.

    `skip`: patterns of layers that LoRA leaves out: peft refuses them, or the model reads their weights elsewhere.
    `skip_bits`: patterns of those that quantization leaves out, because it refuses them.
    `note`: what is not as one would expect.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    bits: Bits
    source: Source
    adapt: str = "lora"
    skip: tuple[str, ...] = ()
    skip_bits: tuple[str, ...] = ()
    note: str = ""

    def made(self) -> nn.Module:
        """The model in eval mode, the same at each call."""
        torch.manual_seed(0)
        return self.build()


# Inputs


def pictures(rows: int, px: int = PX) -> Tensor:
    """Smooth pictures `(rows, 3, px, px)` of ten kinds, with noise."""
    draw = torch.Generator().manual_seed(rows)
    kinds = functional.interpolate(
        torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(1)), size=px, mode="bilinear"
    )
    noise = functional.interpolate(torch.randn(rows, 3, 8, 8, generator=draw), size=px, mode="bilinear")
    return kinds[torch.arange(rows) % CLASSES] + 0.5 * noise + 0.1 * torch.randn(rows, 3, px, px, generator=draw)


def words(rows: int, name: str = "input_ids") -> dict[str, Tensor]:
    """Random tokens."""
    draw = torch.Generator().manual_seed(rows)
    return {name: torch.randint(3, WORDS, (rows, LENGTH), generator=draw)}


def sentences(rows: int) -> dict[str, Tensor]:
    """Random tokens of several lengths, with their mask."""
    mask = torch.ones(rows, LENGTH, dtype=torch.long)
    for row in range(rows):
        mask[row, LENGTH - row % (LENGTH // 2) :] = 0
    return {**words(rows), "attention_mask": mask}


def pairs(rows: int) -> dict[str, Tensor]:
    """For an encoder and a decoder."""
    return {**words(rows), "decoder_input_ids": words(rows + 1)["input_ids"][:rows]}


def captioned(rows: int) -> dict[str, Tensor]:
    """Sentences that end in CLIP's end token, and pictures."""
    found = sentences(rows)
    last = found["attention_mask"].sum(1) - 1
    found["input_ids"][torch.arange(rows), last] = 2
    return {**found, "pixel_values": pictures(rows, 32)}


def spectra(rows: int, bins: int = 40, frames: int = 32) -> Tensor:
    """Smooth spectra `(rows, bins, frames)`."""
    draw = torch.Generator().manual_seed(rows)
    coarse = torch.randn(rows, 1, bins // 4, frames // 4, generator=draw)
    return functional.interpolate(coarse, size=(bins, frames), mode="bilinear")[:, 0]


def heard(rows: int) -> dict[str, Tensor]:
    """Token numbers and what an encoder heard."""
    draw = torch.Generator().manual_seed(rows)
    tokens = words(rows, "decoder_input_ids")
    return {**tokens, "encoder_hidden_states": torch.randn(rows, LENGTH, 64, generator=draw)}


# Builders


def lively(model: nn.Module, examples: Inputs | None = None, *, branches: float = 1.0) -> nn.Module:
    """Random values for every parameter that is constant or tiny, and batch norms that have seen the examples.

    Each layer of a deep network with random weights enlarges a rounding error, and `eager_rounding` in the table says
    how far eager mode is from double precision. Training takes that away: what a block adds to what passes it by
    becomes small. `branches` is that factor for timm's inverted residual blocks.
    """
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() == 3 else parameter[0].numel() if parameter.dim() else 1
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.std() < 0.5 * fan_in**-0.5:
                parameter.copy_(torch.randn_like(parameter) * fan_in**-0.5)
        for block in model.modules():
            if getattr(block, "has_skip", False):
                last = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)][-1]
                last.weight.mul_(branches)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the average of all batches
        if norms and examples is not None:
            model.train()
            call(model, examples)
        for norm in norms:
            norm.momentum = 0.1
    return model.eval()


def of_timm(name: str, px: int = PX, sized: bool = False, branches: float = 1.0) -> nn.Module:
    """A model of timm; `sized` where its layers depend on the size of the picture."""
    timm = import_timm()
    size = {"img_size": px} if sized else {}
    return lively(timm.create_model(name, num_classes=CLASSES, **size), pictures(16, px), branches=branches)


def of_torchvision(name: str) -> nn.Module:
    """A model of torchvision; a segmentation gives the class of each pixel last."""
    import_timm()
    from torchvision import models

    if name.startswith("lraspp"):
        build = models.get_model_builder(name)
        model = build(weights=None, weights_backbone=None, num_classes=CLASSES)
        return lively(First(model, "out", (0, 2, 3, 1)), pictures(16))
    return lively(models.get_model(name, weights=None, num_classes=CLASSES), pictures(16))


def efficientvit_sam() -> nn.Module:
    """The encoder of EfficientViT-SAM over an EfficientViT-L of small widths."""
    import_timm()
    from timm.models.efficientvit_mit import EfficientVitLarge

    backbone = EfficientVitLarge(
        widths=(8, 16, 32, 64, 64), depths=(1, 1, 1, 1, 1), head_dim=16, head_widths=(8, 8), num_classes=0
    )
    return lively(SamEncoder(backbone, (32, 64, 64)), pictures(16))


def of_transformers(kind: str, config: str, settings: dict[str, Any]) -> nn.Module:
    """A model of transformers from its config, with plain attention code."""
    import transformers

    made = getattr(transformers, config)(**settings)
    return lively(getattr(transformers, kind)(made))


def mobillama() -> nn.Module:
    """Llama with one feed-forward for all layers."""
    return shared_ffn(of_transformers("LlamaForCausalLM", "LlamaConfig", DECODER))


def whisper_encoder() -> nn.Module:
    """Whisper's encoder alone: what it heard."""
    return First(of_transformers("WhisperModel", "WhisperConfig", WHISPER).encoder, "last_hidden_state").eval()


def whisper_decoder() -> nn.Module:
    """Whisper's decoder alone, with its head over the words."""
    whole = of_transformers("WhisperForConditionalGeneration", "WhisperConfig", WHISPER)
    return WhisperDecoder(whole).eval()


class WhisperDecoder(nn.Module):
    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.decoder, self.head = whole.model.decoder, whole.proj_out

    def forward(self, decoder_input_ids: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        found = self.decoder(input_ids=decoder_input_ids, encoder_hidden_states=encoder_hidden_states, use_cache=False)
        return self.head(found.last_hidden_state)


def pose() -> nn.Module:
    """LitePose-like."""
    return lively(Pose(), pictures(16))


def chela() -> nn.Module:
    """CHELA-like."""
    return lively(Chela(WORDS))


def voice() -> nn.Module:
    """silero-vad-like."""
    return lively(VoiceDetector())


def clip() -> nn.Module:
    """CLIP with a small tower for each side."""
    import transformers

    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": WORDS, "max_position_embeddings": LENGTH, "eos_token_id": 2, "pad_token_id": 1,
            "bos_token_id": 0}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=32
    )
    return lively(Clip(transformers.CLIPModel(config)))


ENCODER = {
    "vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
    "max_position_embeddings": 64, "num_labels": CLASSES, "pad_token_id": 1,
}  # fmt: skip
MINILM = {**ENCODER, "hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 384}
MODERN = {**ENCODER, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2, "local_attention": 8,
          "global_attn_every_n_layers": 2}  # fmt: skip
DISTIL = {"vocab_size": WORDS, "dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 128, "num_labels": CLASSES,
          "max_position_embeddings": 64, "pad_token_id": 1}  # fmt: skip
T5 = {"vocab_size": WORDS, "d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2,
      "pad_token_id": 1, "decoder_start_token_id": 0}  # fmt: skip
DECODER = {
    "vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 128, "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
SMOLLM2 = {**DECODER, "hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 256,
           "tie_word_embeddings": True}  # fmt: skip
GEMMA3 = {**DECODER, "head_dim": 32, "num_hidden_layers": 2, "sliding_window": 8, "tie_word_embeddings": True,
          "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 32}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2}
MAMBA = {"vocab_size": WORDS, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2, "pad_token_id": 1,
         "bos_token_id": 0, "eos_token_id": 2}  # fmt: skip
WHISPER = {
    "vocab_size": WORDS, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 40,
    "max_source_positions": 16, "max_target_positions": 32, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip


def _timm(
    name: str, model: str, px: int = PX, sized: bool = False, adapt: str = "lora", branches: float = 1.0
) -> Family:
    build = functools.partial(of_timm, model, px, sized, branches)
    scaled = f"what a residual block adds is scaled by {branches}, as training makes it small"
    note = "" if branches == 1.0 else f"{scaled}; without, eager mode is far from double precision"
    return Family(name, build, functools.partial(pictures, px=px), "int8", "timm", adapt, note=note)


def _vision(name: str, model: str, adapt: str = "lora") -> Family:
    return Family(name, functools.partial(of_torchvision, model), pictures, "int8", "timm", adapt)


def _text(
    name: str, kind: str, config: str, settings: dict[str, Any], inputs: Callable[[int], Inputs] = words,
    adapt: str = "lora",
) -> Family:  # fmt: skip
    build = functools.partial(of_transformers, kind, config, settings)
    return Family(name, build, inputs, "int4", "transformers", adapt)


_CLASSIFIER, _CAUSAL = "ForSequenceClassification", "ForCausalLM"

FAMILIES = {
    family.name: family
    for family in (
        _timm("MobileNetV3", "mobilenetv3_small_050"),
        _timm("MobileNetV4", "mobilenetv4_conv_small_050"),
        _timm("MobileOne", "mobileone_s0"),
        _timm("EfficientNet", "efficientnet_b0", branches=0.2),
        _timm("EfficientNet-Lite", "efficientnet_lite0"),
        _timm("RegNet", "regnety_002"),
        _timm("ReXNet", "rexnet_100"),
        _timm("GENet", "gernet_s"),
        _timm("TResNet", "tresnet_m", adapt="last-1"),
        _timm("SHViT", "shvit_s1"),
        _timm("StarNet", "starnet_s050"),
        _timm("FBNetV3", "fbnetv3_b", branches=0.2),
        _timm("EfficientViT (MIT)", "efficientvit_b0"),
        _timm("EfficientViT (MSRA)", "efficientvit_m0", 224),
        Family("EfficientViT-SAM encoder", efficientvit_sam, pictures, "int8", "timm"),
        _timm("RepViT", "repvit_m0_9"),
        _timm("FastViT", "fastvit_t8"),
        _timm("MobileViTv2", "mobilevitv2_050"),
        _timm("ConvNeXt-atto", "convnext_atto"),
        _timm("ViT-tiny", "vit_tiny_patch16_224", sized=True),
        _timm("TinyViT", "tiny_vit_5m_224"),
        _vision("SqueezeNet", "squeezenet1_1"),
        _vision("ShuffleNetV2", "shufflenet_v2_x0_5"),
        _timm("ResNet", "resnet18", adapt="last-1"),
        Family("pose head", pose, pictures, "int8", "here"),
        _vision("segmentation head", "lraspp_mobilenet_v3_large"),
        _text("BERT", "Bert" + _CLASSIFIER, "BertConfig", ENCODER, sentences),
        _text("MiniLM", "Bert" + _CLASSIFIER, "BertConfig", MINILM, sentences),
        _text("DistilBERT", "DistilBert" + _CLASSIFIER, "DistilBertConfig", DISTIL, sentences),
        _text("ModernBERT", "ModernBert" + _CLASSIFIER, "ModernBertConfig", MODERN, sentences),
        _text("T5-small", "T5ForConditionalGeneration", "T5Config", T5, pairs),
        _text("Llama", "Llama" + _CAUSAL, "LlamaConfig", DECODER),
        _text("SmolLM2", "Llama" + _CAUSAL, "LlamaConfig", SMOLLM2),
        _text("Qwen3", "Qwen3" + _CAUSAL, "Qwen3Config", {**DECODER, "head_dim": 32}),
        _text("Gemma 3", "Gemma3" + _CAUSAL, "Gemma3TextConfig", GEMMA3),
        _text("Phi", "Phi" + _CAUSAL, "PhiConfig", DECODER),
        Family("MobiLlama", mobillama, words, "int4", "transformers", "last-1"),
        _text("OLMoE", "Olmoe" + _CAUSAL, "OlmoeConfig", {**DECODER, **EXPERTS, "num_experts": 4}),
        _text("Mixtral", "Mixtral" + _CAUSAL, "MixtralConfig", {**DECODER, **EXPERTS, "num_local_experts": 4}),
        replace(
            _text("Mamba", "Mamba" + _CAUSAL, "MambaConfig", MAMBA),
            skip=("*.out_proj", "*.conv1d", "*.dt_proj"),
            skip_bits=("*.dt_proj",),
            note="int4 leaves dt_proj in fp32, whose input is 4 wide: no multiple of its groups",
        ),
        Family("linear attention (CHELA-like)", chela, words, "int4", "here"),
        Family("Whisper encoder", whisper_encoder, lambda n: {"input_features": spectra(n)}, "int4", "transformers"),
        replace(
            Family("Whisper decoder", whisper_decoder, heard, "int4", "transformers"),
            note="int4 leaves the table of positions in fp32, which is read by slices",
        ),
        Family("CLIP", clip, captioned, "int4", "transformers"),
        Family("voice detector (LSTM)", voice, spectra, "int8", "here"),
    )
}
