"""int4: sizes, errors, tied weights."""

from __future__ import annotations

import copy
import platform
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from edgetune.core.apply import apply
from edgetune.core.errors import EdgetuneError
from edgetune.core.freed import release_freed_memory
from edgetune.core.quiet import silence_libraries
from edgetune.core.technique import Sample, Technique
from edgetune.export import export
from edgetune.quant import blocks
from edgetune.quant.int4 import Int4
from edgetune.quant.int8_dynamic import Int8Dynamic
from edgetune.quant.size import parameter_count, stored_bytes, tensor_bytes
from edgetune.runtime.clock.machine import resident_mib

with silence_libraries():  # torchao warns on import
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]


class Tied(nn.Module):
    """A language model in three lines: the head shares the table's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 32, padding_idx=0)
        self.body = nn.Linear(32, 32)
        self.lm_head = nn.Linear(32, 50, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(torch.tanh(self.body(self.embed_tokens(ids))))


def tied() -> Tied:
    torch.manual_seed(0)
    return Tied().eval()


def test_int4_counts_half_a_byte_for_a_weight() -> None:
    layer = nn.Sequential(nn.Linear(64, 10, bias=False))
    assert stored_bytes(layer) == 64 * 10 * 4
    Int4().apply(layer)
    scales = 10 * (64 // 32) * 2
    assert stored_bytes(layer) == 64 * 10 // 2 + scales
    assert parameter_count(layer) == 640


def test_int4_stays_within_half_a_step_of_each_weight() -> None:
    torch.manual_seed(1)
    layer = nn.Sequential(nn.Linear(64, 16))
    before = layer[0].weight.detach().clone()
    Int4().apply(layer)
    quantized = layer[0].weight
    step = quantized.scale.float().repeat_interleave(32, dim=1)
    error = (quantized.dequantize() - before).abs()
    clipped = before >= 7 * step  # symmetric: +7.5 steps has no code
    rounding = 8 * 2**-8  # codes are computed with bf16 scales in bf16, and a code is at most 8
    assert (error[~clipped] <= (0.501 + rounding) * step[~clipped]).all()
    assert (error[clipped] <= (1.001 + rounding) * step[clipped]).all()
    assert error.max() > 0


@pytest.mark.parametrize("embeddings", ["int8", "int4"])
def test_int4_quantizes_rows_in_blocks_as_torchao_does_at_once(
    monkeypatch: pytest.MonkeyPatch, embeddings: Literal["int8", "int4"]
) -> None:
    model, whole = tied(), tied()
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 7 * 32)  # 50 rows: a last block of one row
    random_state = torch.get_rng_state()
    settings = Int4(int8_linears=("lm_head",), embeddings=embeddings)
    settings.apply(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    four_bits = Int8DynamicActivationIntxWeightConfig(INT4, PerGroup(32), weight_scale_dtype=torch.bfloat16)
    eight_bits = Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0), weight_scale_dtype=torch.float32)
    table = {"int8": IntxWeightOnlyConfig(torch.int8), "int4": IntxWeightOnlyConfig(INT4, PerGroup(32))}[embeddings]
    for name, config in (("embed_tokens", table), ("lm_head", eight_bits), ("body", four_bits)):
        expected = whole.get_submodule(name)
        with silence_libraries():
            quantize_(expected, config, filter_fn=lambda *_: True)
        layer = model.get_submodule(name)
        assert repr(layer.weight) == repr(expected.weight)
        for part in layer.weight.tensor_data_names:
            assert torch.equal(getattr(layer.weight, part), getattr(expected.weight, part)), (name, part)


def test_large_quantized_layers_are_unpacked_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 7 * 32)
    model = tied()
    model.lm_head.bias = nn.Parameter(torch.randn(50))
    Int4(int8_linears=("lm_head",)).apply(model)
    unpacked: list[int] = []
    dequantize = type(model.body.weight).dequantize

    def count_rows(weight: torch.Tensor) -> torch.Tensor:
        unpacked.append(weight.shape[0])
        return dequantize(weight)

    monkeypatch.setattr(type(model.body.weight), "dequantize", count_rows)
    ids = torch.arange(6)
    expected = model(ids)
    assert sorted(unpacked) == [32, 50, 50], "the table, the body and the head"
    unpacked.clear()
    with blocks.unpack_by_rows(model):
        assert torch.allclose(model(ids), expected, atol=1e-5)
    assert sum(unpacked) == len(ids) + 32 + 50
    assert max(unpacked) == 7
    assert torch.equal(model(ids), expected)


@pytest.mark.parametrize(
    ("technique", "width"),
    [
        (Int4(), 96), (Int4(group_size=64), 192), (Int4(group_size="channel"), 96), (Int4(group_size="channel"), 32),
        (Int4(algorithm="mse"), 96), (Int4(int8_linears=("0",)), 96),
        (Int8Dynamic(), 96), (Int8Dynamic(), 33),
    ],
    ids=str,
)  # fmt: skip
def test_the_program_computes_what_the_quantized_model_does(technique: Technique, width: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5)).eval(), torch.randn(40, width)
    apply(model, technique, Sample.of(x))
    artifact = export(model, x[:1], tmp_path / "model.pte", check_inputs=[x], one_row=True)
    assert artifact.manifest.main.parity is not None
    assert artifact.manifest.main.parity.max_abs_difference < 1e-5


def test_int4_unties_the_head_from_the_table() -> None:
    model = tied()
    shared = model.embed_tokens.weight.detach().clone()
    ids = torch.arange(50)[None]
    expected = model(ids)
    assert parameter_count(model) == 50 * 32 + 32 * 32 + 32
    Int4().apply(model)
    assert model.lm_head.weight.target_dtype == torch.int4
    assert model.embed_tokens.weight.target_dtype == torch.int8
    assert model.embed_tokens.padding_idx is None
    assert torch.allclose(model.embed_tokens.weight.dequantize(), shared, atol=float(shared.abs().max()) / 100)
    assert torch.allclose(model.lm_head.weight.dequantize(), shared, atol=float(shared.abs().max()) / 7)
    assert (model(ids) - expected).norm() < 0.25 * expected.norm()


def test_int4_leaves_out_what_skip_names() -> None:
    model = Int4(skip=("lm_head", "embed_tokens")).apply(tied())
    assert type(model.lm_head.weight) is nn.Parameter
    assert type(model.embed_tokens.weight) is nn.Parameter
    assert model.body.weight.target_dtype == torch.int4


def test_a_group_is_a_multiple_of_what_kernels_take() -> None:
    with pytest.raises(EdgetuneError, match=r"group_size: must be a multiple of 32 or .*got 40; allowed: channel"):
        Int4(group_size=40)
    assert Int4(group_size="channel").width_multiple == 32


def test_int4_refuses_a_skip_that_names_nothing() -> None:
    with pytest.raises(EdgetuneError, match=r"skip: the pattern matches no layer: got 'lm_heed'.*lm_head"):
        Int4(skip=("lm_heed",)).apply(tied())


def test_int4_refuses_a_table_with_max_norm() -> None:
    with pytest.raises(EdgetuneError, match="max_norm"):
        Int4().apply(nn.ModuleDict({"table": nn.Embedding(5, 4, max_norm=1.0), "linear": nn.Linear(32, 2)}))


def test_int4_refuses_a_projection_that_is_read_directly() -> None:
    model = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    with pytest.raises(EdgetuneError, match=r'out_proj is not called[\s\S]*add "self_attn\.out_proj" to skip'):
        Int4().apply(model)
    x = torch.randn(1, 4, 32)
    with torch.no_grad():
        expected = model(x)
        with pytest.warns(UserWarning, match=r"self_attn\.in_proj_weight: these weights do not belong to"):
            Int4(skip=("self_attn.out_proj",)).apply(model)
        got = model(x)
    assert 0 < (got - expected).norm() < 0.3 * expected.norm()


def test_a_model_of_convolutions_is_sent_to_int8() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8))
    with pytest.raises(EdgetuneError, match=r"Sequential has no linear layers, and int4[\s\S]*next: use int8, which"):
        Int4().apply(model)


def test_int4_copies_and_counts_a_shared_layer_once() -> None:
    layer = nn.Linear(32, 8, bias=False)
    model = Int4().apply(nn.ModuleDict({"a": layer, "b": layer}))
    assert stored_bytes(model) == tensor_bytes(layer.weight)
    assert stored_bytes(copy.deepcopy(model)) == stored_bytes(model)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no call for it")
def test_freed_memory_is_returned_to_the_system() -> None:
    blocks_of_64_kib = [torch.ones(2**14) for _ in range(2**11)]  # 128 MiB on the heap
    last = blocks_of_64_kib[1::64]  # some of them stay, between those that are freed
    before = resident_mib("VmRSS")
    del blocks_of_64_kib
    release_freed_memory()
    assert resident_mib("VmRSS") < before - 64
    assert all(bool((block == 1).all()) for block in last)


@pytest.mark.parametrize("technique", [Int4(), Int8Dynamic()], ids=["int4", "int8_dynamic"])
def test_the_note_names_the_convolutions_that_stay(technique: Technique) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 8)).eval()
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    model = apply(model, technique, Sample.of(x))
    assert technique.note(model) == "2 convolutions stay in floating point, 84.2 % of the parameters: 0, 2"
    assert technique.note(apply(Tied(), technique, Sample.of(torch.arange(6).view(2, 3)))) == ""
