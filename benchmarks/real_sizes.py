"""Models at the sizes people use, with random weights, beside the small ones that bench_profile.py predicts.

`DRAWN` are ten networks of timm that `python benchmarks/real_sizes.py` drew after the terms of the predictor were
frozen: no file of the repository named them before.
"""

from __future__ import annotations

import functools
import random
import subprocess
from pathlib import Path

import torch
from torch import Tensor, nn

from edgetune.core.inputs import Inputs
from support.families import Family, WhisperDecoder, lively, pictures, spectra
from support.nets import First
from support.timm_apart import import_timm

PX, TOKENS, WORDS, MODERN_WORDS = 224, 128, 30_522, 50_368
BINS, FRAMES, SAID, WHISPER_WORDS = 80, 3000, 64, 51_865  # half a minute of speech, and a sentence
NETWORKS = (
    "mobilenetv3_large_100", "mobilenetv4_conv_medium", "efficientnet_b0", "resnet50", "convnext_tiny",
    "vit_small_patch16_224", "fastvit_t8", "repvit_m1_0", "resnet18", "vit_tiny_patch16_224", "convnext_atto",
)  # fmt: skip
DRAWN = (
    "gcvit_xxtiny", "fbnetc_100", "vovnet39a", "mambaout_femto", "regnetv_040", "seresnext50_32x4d", "hgnetv2_b2",
    "cspnext_m", "regnetx_032", "densenet121",
)  # fmt: skip
_MOST_PARAMETERS, _DRAWN, _SEED = 40e6, 10, 17


def _network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return lively(import_timm().create_model(name), pictures(8, PX), branches=0.2)


def bert(width: int, layers: int, heads: int) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def _modern() -> nn.Module:
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    torch.manual_seed(0)
    return ModernBertForSequenceClassification(ModernBertConfig()).eval()  # its defaults are the base model's


def _whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    return WhisperForConditionalGeneration(WhisperConfig()).eval()  # its defaults are the tiny model's


def _hearing() -> nn.Module:
    return First(_whisper().model.encoder, "last_hidden_state").eval()


def _telling() -> nn.Module:
    return WhisperDecoder(_whisper()).eval()


def sentences(rows: int, name: str = "input_ids", words: int = WORDS, tokens: int = TOKENS) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(rows)
    return {name: torch.randint(3, words, (rows, tokens), generator=draw)}


def _speech(rows: int) -> Inputs:
    return {"input_features": spectra(rows, BINS, FRAMES)}


def _heard(rows: int) -> Inputs:
    tokens = sentences(rows, "decoder_input_ids", WHISPER_WORDS, SAID)
    return {**tokens, "encoder_hidden_states": torch.randn(rows, FRAMES // 2, 384)}


def _vision(name: str) -> Family:
    return Family(
        f"{name} at {PX}", functools.partial(_network, name), functools.partial(pictures, px=PX), "int8", "timm"
    )


REAL = {
    family.name: family
    for family in (
        *map(_vision, NETWORKS),
        Family("MiniLM at 128", functools.partial(bert, 384, 12, 12), sentences, "int4", "transformers"),
        Family("BERT-base at 128", functools.partial(bert, 768, 12, 12), sentences, "int4", "transformers"),
        Family(
            "ModernBERT-base at 128", _modern, functools.partial(sentences, words=MODERN_WORDS), "int4", "transformers"
        ),
        Family("Whisper-tiny encoder", _hearing, _speech, "int4", "transformers"),
        Family("Whisper-tiny decoder", _telling, _heard, "int4", "transformers"),
        *map(_vision, DRAWN),
    )
}


def name_of(model: str, bits: str) -> str:
    """Of a program's files."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in f"{model}-{bits}")


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The message of the error that ended a process."""
    errors = [line for line in done.stderr.splitlines() if "Error: " in line]
    return errors[-1].partition("Error: ")[2] if errors else f"it ended with code {done.returncode}"


def draw() -> list[str]:
    """Ten networks of timm for pictures of 224 px, of as many architectures, that no file of the repository names."""
    timm = import_timm()
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "grep", "-hoE", "[a-z]+[a-z0-9_]*"]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    named = {_kind(word) for word in words}
    names = timm.list_models()
    random.Random(_SEED).shuffle(names)
    drawn: dict[str, str] = {}
    for name in names:
        kind = _kind(name)
        if kind in named or kind in drawn:
            continue
        settings = timm.models.get_pretrained_cfg(name)
        if settings is None or tuple(settings.input_size) != (3, PX, PX):
            continue
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        if size <= _MOST_PARAMETERS:
            drawn[kind] = name
        if len(drawn) == _DRAWN:
            break
    return list(drawn.values())


def _kind(name: str) -> str:
    """The letters that a name begins with: of `resnet18` `resnet`."""
    return name[: len(name) - len(name.lstrip("abcdefghijklmnopqrstuvwxyz"))]


if __name__ == "__main__":
    print(*draw(), sep="\n")
