"""Operator lists of networks and language models: their size is that of the papers, their traffic what it should be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers

from edgetune.profile.reference import NETWORKS
from edgetune.profile.reference.language import (
    ARCHITECTURES,
    QUANTIZATION_SCHEMES,
    Architecture,
    decode,
    file_mib,
    prefill,
)
from edgetune.program.operators import Operator
from edgetune.quant.int4 import Int4
from support.decoders import export_decoder

# million multiply-accumulates and parameters as published: the papers' tables, else torchvision's documentation
PUBLISHED = {
    "mobilenet-v1": (569, 4.2),
    "mobilenet-v2": (300, 3.5),
    "mobilenet-v3-large": (217, 5.48),
    "mobilenet-v3-small": (56.5, 2.54),
    "mnasnet": (314, 4.38),
    "efficientnet-b0": (386, 5.29),
    "efficientnet-v2-s": (8366, 21.46),
    "resnet-18": (1814, 11.69),
    "resnet-50": (4089, 25.56),
    "wide-resnet-50": (11398, 68.88),
    "vgg-16": (15470, 138.36),
    "squeezenet-1.0": (819, 1.248),
    "squeezenet-1.1": (349, 1.235),
    "googlenet": (1498, 6.62),
    "shufflenet-v2": (145, 2.28),
}
# parameters as the models' pages count them
MODELS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "phi-4-mini": 3_836_021_760,
    "gemma-3-1b": 999_885_952,
    "olmo-1b": 1_176_764_416,
}


def test_every_network_and_model_is_held_to_a_published_size() -> None:
    assert set(PUBLISHED) == set(NETWORKS)
    assert set(MODELS) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_network_has_the_published_size(name: str) -> None:
    operators = NETWORKS[name](dtype="fp32")
    mega_macs, mega_parameters = PUBLISHED[name]
    assert sum(o.macs for o in operators) / 1e6 == pytest.approx(mega_macs, rel=0.02)
    assert sum(o.weight_bytes for o in operators) / 4e6 == pytest.approx(mega_parameters, rel=0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_type_changes_bytes_and_nothing_else(name: str) -> None:
    whole, eight = NETWORKS[name](dtype="fp32"), NETWORKS[name](dtype="int8")
    assert [o.macs for o in whole] == [o.macs for o in eight]
    assert [o.weight_bytes for o in whole] == [4 * o.weight_bytes for o in eight]
    assert [o.activation_bytes for o in whole] == [4 * o.activation_bytes for o in eight]
    assert {o.dtype for o in eight} == {"int8"}
    assert all(o.activation_bytes > 0 and o.delegated for o in whole)


def test_operators_are_told_as_a_program_tells_them() -> None:
    """The names and sizes of `edgetune.program.executed`: channels last, columns of one group."""
    first, depthwise, pointwise, *_, mean, classifier = NETWORKS["mobilenet-v1"](dtype="fp32")
    assert (first.operator, first.kind, first.output_shape) == ("xnnpack.conv2d", "conv", (1, 112, 112, 32))
    assert (first.columns, first.window) == (32, 9)
    assert (depthwise.operator, depthwise.kind) == ("xnnpack.depthwise-conv2d", "depthwise-conv")
    assert (depthwise.columns, depthwise.groups, depthwise.window) == (32, 1, 9)
    assert (pointwise.kind, pointwise.columns, pointwise.window) == ("pointwise-conv", 64, 1)
    assert (mean.operator, mean.kind, mean.window) == ("xnnpack.global-avg-pooling2d", "reduction", 49)
    assert (classifier.operator, classifier.columns) == ("xnnpack.fully-connected", 1000)


def test_macs_grow_with_the_area_of_the_image() -> None:
    resnet50 = NETWORKS["resnet-50"]
    small, large = resnet50(), resnet50(size=448)
    convolutions = [sum(o.macs for o in net if "conv" in o.kind) for net in (small, large)]
    assert convolutions[1] == 4 * convolutions[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_language_model_has_the_published_parameters(name: str) -> None:
    assert ARCHITECTURES[name].parameters == MODELS[name]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", QUANTIZATION_SCHEMES)
def test_a_decoding_step_reads_every_weight_once(name: str, scheme: str) -> None:
    model, stored = ARCHITECTURES[name], QUANTIZATION_SCHEMES[scheme]
    linears = [o for o in decode(model, stored) if o.kind == "linear"]
    wanted = (model.block_parameters * stored.block_bits + model.head_parameters * stored.head_bits) / 8
    adapters = model.layers * stored.adapter_rank * sum(rows + columns for _, columns, rows in model.matrices)
    assert sum(o.weight_bytes for o in linears) == pytest.approx(wanted + 4 * adapters, rel=1e-6)
    assert sum(o.macs for o in linears) == model.block_parameters + model.head_parameters + adapters


def test_the_cache_is_read_and_attended_to() -> None:
    model, scheme = ARCHITECTURES["llama-3.2-1b"], QUANTIZATION_SCHEMES["bf16"]
    # 16 layers x 8 heads x 64 x (key, value) x 2 bytes = 32 KiB a token
    assert model.cache_mib_per_token(2) == pytest.approx(32 / 1024)
    empty, full = decode(model, scheme, 0), decode(model, scheme, 1000)
    more = sum(o.activation_bytes for o in full) - sum(o.activation_bytes for o in empty)
    assert more == 1000 * 32 * 1024
    attention = [sum(o.macs for o in step if o.kind == "matmul") for step in (empty, full)]
    assert attention == [2 * 16 * 2048 * 1, 2 * 16 * 2048 * 1001]


def test_a_prefill_multiplies_for_every_token_but_the_head_for_one() -> None:
    model, scheme = ARCHITECTURES["llama-3.2-1b"], QUANTIZATION_SCHEMES["8da4w-g32-head8"]
    linears = [o for o in prefill(model, scheme, 64) if o.kind == "linear"]
    assert sum(o.macs for o in linears) == 64 * model.block_parameters + model.head_parameters
    assert sum(o.weight_bytes for o in linears) == sum(
        o.weight_bytes for o in decode(model, scheme) if o.kind == "linear"
    )
    seen = sum(o.macs for o in prefill(model, scheme, 64) if o.kind == "matmul")
    assert seen == 2 * 16 * 2048 * (64 * 65 // 2)


def test_files_have_the_published_size() -> None:
    """pytorch/executorch examples/models/llama/README.md, .pte in MiB."""
    for name, scheme, published in (
        ("llama-3.2-1b", "bf16", 2358), ("llama-3.2-1b", "8da4w-g32-head8", 1083),
        ("llama-3.2-1b", "8da4w-g32-head8-lora16", 1127), ("llama-3.2-3b", "bf16", 6129),
        ("llama-3.2-3b", "8da4w-g32-head8", 2435), ("llama-3.2-3b", "8da4w-g32-head8-lora16", 2529),
    ):  # fmt: skip
        assert file_mib(ARCHITECTURES[name], QUANTIZATION_SCHEMES[scheme]) == pytest.approx(published, rel=0.005)


FAMILIES = {"Llama": {}, "Qwen2": {"attention_bias": True}, "Qwen3": {"head_norms": True}}
COMPARED = (("linear", "macs"), ("linear", "weight_bytes"), ("matmul", "macs"), ("matmul", "activation_bytes"))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_model_multiplies_and_reads_what_its_reference_does(family: str, tmp_path: Path) -> None:
    """Also where the width of a head is the number of prompt tokens in a call, which one token must not take for it."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Int4(group_size=32).apply(getattr(transformers, f"{family}ForCausalLM")(config).eval())
    artifact = export_decoder(model, tmp_path)
    architecture = Architecture("small", 2, 128, 256, 4, 2, 32, 512, **FAMILIES[family])
    scheme = QUANTIZATION_SCHEMES["8da4w-g32"]
    token, prompt = artifact.manifest.calls
    calls = ((token, decode(architecture, scheme, 32), 1), (prompt, prefill(architecture, scheme, 32), 32))
    for call, reference, rows in calls:
        for operators in (call.operators, call.executed):
            for kind, key in COMPARED:
                expected = _sum(reference, kind, key)
                assert _sum(operators, kind, key) == pytest.approx(expected, rel=0.02), (call.label, kind, key)
            moved = sum(o.weight_bytes + o.activation_bytes for o in operators if "update_cache" in o.operator)
            assert moved == 2 * 2 * 2 * rows * 2 * 32 * 4, "keys and values of two layers, read and written"


def _sum(operators: Sequence[Operator], kind: str, key: str) -> int:
    """Attention is a product, whatever its kernel is called."""
    return sum(getattr(o, key) for o in operators if ("matmul" if "sdpa" in o.operator else o.kind) == kind)
