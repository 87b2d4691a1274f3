from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from edgetune.adapt.lora import LoRA
from edgetune.core.apply import apply, finalize
from edgetune.core.carriers import plain_layer
from edgetune.core.errors import EdgetuneError
from edgetune.core.packed_layers import is_nf4
from edgetune.quant.nf4 import NF4, import_bitsandbytes, pack_linear
from edgetune.quant.size import stored_bytes
from edgetune.sparse.update import SparseUpdate
from support.laws import bert, dense, llama, logits, mlp, tokens, vectors
from support.sizes import packed_bytes

torch.set_num_threads(1)

# Half of the widest gap between neighbouring NF4 codes (-1 and -0.6962), for a block whose largest weight is 1.
WORST_ROUNDING = (1 - 0.6961928) / 2


def four_bit(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_nf4(module)]


@pytest.mark.parametrize(
    ("rows", "columns", "block_size"), [(40, 96, 32), (32, 64, 64), (9, 64, 32), (7, 512, 256), (2, 8192, 4096)]
)
@pytest.mark.parametrize("double_quant", [False, True])
def test_size_and_rounding(rows: int, columns: int, block_size: int, double_quant: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(columns, rows)
    layer = pack_linear(import_bitsandbytes(), plain, block_size, double_quant)
    assert stored_bytes(layer) == packed_bytes(rows * columns, block_size, double_quant) + 4 * rows
    weights = plain.weight.detach().flatten()
    scales = torch.stack([block.abs().max() for block in weights.split(block_size)])
    bound = WORST_ROUNDING * scales + (0.01 * scales.max() if double_quant else 1e-6)
    error = (dense(layer).flatten() - weights).abs()
    assert error.max() > 0
    assert all(bool((e <= b).all()) for e, b in zip(error.split(block_size), bound, strict=True))


@pytest.mark.parametrize("width", [40, 64])  # 64: what bitsandbytes would rearrange in eval mode; 40: where it fails
def test_forwards_change_nothing(width: int) -> None:
    layer = pack_linear(import_bitsandbytes(), nn.Linear(64, width), 64, True).eval()
    before, x = dense(layer), torch.randn(5, 64)
    with torch.no_grad():
        eager = layer(x)
    torch.testing.assert_close(eager, nn.functional.linear(x, before, layer.bias))
    assert torch.equal(dense(layer), before)
    y = torch.randn(2, 5, 64, requires_grad=True)  # and it still trains what lies below it
    layer.train()(y).sum().backward()
    torch.testing.assert_close(y.grad, before.sum(0).expand_as(y))
    torch.testing.assert_close(layer.bias.grad, torch.full((width,), 10.0))


def test_dense_is_right_for_a_layer_that_another_loader_let_be_rearranged() -> None:
    layer = pack_linear(import_bitsandbytes(), nn.Linear(64, 64), 64, False).eval()
    before, x = dense(layer), torch.randn(5, 64)
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes never rearranges a weight")
    layer.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        layer(x)
    assert layer.weight.quant_state.packing_format_for_cpu
    torch.testing.assert_close(dense(layer), before, atol=2e-3, rtol=1e-2)  # its scales are bf16 now
    assert layer.weight.quant_state.packing_format_for_cpu  # looking did not put it back


def test_heads_are_left_out_unless_asked_for() -> None:
    assert "lm_head" not in four_bit(NF4(block_size=32).apply(llama()))
    assert len(four_bit(NF4(block_size=32).apply(llama()))) == 14
    assert "classifier" not in four_bit(NF4(block_size=32).apply(bert()))
    assert "classifier" in four_bit(NF4(block_size=32, skip=()).apply(mlp()))
    assert four_bit(NF4(block_size=32, targets=("blocks.1.*",), skip=("*.down",)).apply(mlp())) == ["blocks.1.up"]


def test_a_skip_that_the_user_wrote_must_match() -> None:
    with pytest.raises(EdgetuneError, match=r"skip.*'lm_head'"):
        NF4(block_size=32, skip=("lm_head",)).apply(mlp())


def test_a_copy_does_not_hold_the_layer_it_came_from() -> None:
    model = NF4(block_size=32).apply(mlp())
    other = copy.deepcopy(model)
    assert stored_bytes(other) == stored_bytes(model)
    assert other.stem.weight.module is None
    with torch.no_grad():
        other.stem.weight.quant_state.absmax.zero_()
    assert dense(model.stem).abs().max() > 0


def test_a_plain_checkpoint_is_packed_as_it_is_loaded() -> None:
    plain, model = mlp(), NF4(block_size=32).apply(mlp())
    with torch.no_grad():
        plain.stem.weight.mul_(3)
    expected = dense(pack_linear(import_bitsandbytes(), plain.stem, 32, True))
    model.load_state_dict(plain.state_dict())
    assert torch.equal(dense(model.stem), expected)


def test_only_what_is_packed_is_frozen_and_finalize_gives_plain_linears() -> None:
    model = NF4(block_size=32).apply(bert())
    packed_names = {f"{name}.weight" for name in four_bit(model)}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == packed_names
    rounded = logits(model, tokens())
    plain = NF4(block_size=32).finalize(model)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in plain.parameters())
    assert not four_bit(plain)
    torch.testing.assert_close(logits(plain, tokens()), rounded)


def test_what_cannot_be_packed_raises() -> None:
    with pytest.raises(EdgetuneError, match="nf4: cannot follow"):
        apply(mlp(), [LoRA(rank=2, targets=("stem",)), NF4(block_size=32)])
    with pytest.raises(EdgetuneError, match="nf4: cannot follow"):
        apply(mlp(), [SparseUpdate(scheme="last-1"), NF4(block_size=32)])
    with pytest.raises(EdgetuneError, match="reads its weight directly"):
        NF4(block_size=32).apply(nn.TransformerEncoderLayer(8, 2, 16))
    with pytest.raises(EdgetuneError, match="shares its weight"):
        NF4(block_size=32, skip=()).apply(llama(tied=True))
    with pytest.raises(EdgetuneError, match=r"does not divide the input width 32 of stem[^$]*block_size=32"):
        NF4(block_size=64).apply(mlp())
    with pytest.raises(EdgetuneError, match="NonDynamicallyQuantizableLinear"):
        NF4(targets=("1",)).apply(
            nn.Sequential(nn.Linear(4, 4), nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4))
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_packed_layer_computes_in_the_type_it_had_and_notes_it(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64, bias=False)).to(dtype)
    bias, x = model[0].bias, torch.randn(5, 64, dtype=dtype, requires_grad=True)
    NF4(block_size=32).apply(model)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(layer.plain_dtype == dtype for layer in other)
    weights = [dense(layer).to(dtype) for layer in model]
    y = model(x)
    expected = nn.functional.linear(nn.functional.linear(x, weights[0], bias), weights[1])
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 0.02, torch.float16: 0.002}[dtype]
    torch.testing.assert_close(y, expected, atol=tolerance, rtol=tolerance)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (weights[1].sum(0) @ weights[0]).expand_as(x), atol=tolerance, rtol=tolerance)
    assert model[0].bias is bias
    assert bias.dtype == bias.grad.dtype == dtype


def test_what_it_cannot_pack_is_named_truly() -> None:
    size = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 48, "bos_token_id": 1, "eos_token_id": 2}
    gpt2 = GPT2LMHeadModel(GPT2Config(**size))
    with pytest.raises(EdgetuneError, match=r"only nn\.Linear is stored in 4 bits.*none but a head.*c_attn.*Conv1D"):
        NF4(block_size=32).apply(gpt2)
    with pytest.raises(EdgetuneError, match=r"c_fc: Conv1D: got '\*\.c_fc'"):
        NF4(block_size=32, targets=("*.c_fc",), skip=()).apply(gpt2)
    with pytest.raises(EdgetuneError, match=r"stem cannot be packed in 4 bits: got 'torch\.float64'"):
        NF4(block_size=32).apply(mlp().double())


@pytest.mark.parametrize("settings", [{"block_size": 48}, {"double": True}])
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(EdgetuneError):
        NF4(**settings)


def test_the_logger_is_left_as_it_was() -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    import_bitsandbytes()
    assert logger.level == level


def test_fp4_rounds_to_the_values_of_a_4_bit_float() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 8)
    layer = pack_linear(import_bitsandbytes(), plain, 64, False, "fp4").eval()
    magnitudes = (dense(layer) / plain.weight.detach().abs().amax(1, keepdim=True)).abs()
    values = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
    assert (magnitudes[..., None] - values).abs().amin(-1).max() < 2e-3
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense(layer), plain.bias))
    layer.load_state_dict(plain.state_dict())
    assert layer.weight.quant_state.quant_type == "fp4"


def trained(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        (model(vectors()) - 1).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_merge_onto_the_original_weights_if_asked(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain, inputs = mlp().to(dtype), vectors().to(dtype)
    steps = [NF4(block_size=32, merge_base="fp"), LoRA(rank=2, targets=("blocks.*.up",))]
    open_model = apply(copy.deepcopy(plain), steps)
    for name, parameter in open_model.named_parameters():
        if parameter.requires_grad and "lora" in name.lower():
            nn.init.normal_(parameter, std=0.3)
    adapted = {n: dense(m) for n, m in open_model.named_modules() if is_nf4(m) or n.endswith(".up")}
    rounded = {n: dense(plain_layer(m)) for n, m in open_model.named_modules() if n in adapted}
    untouched = copy.deepcopy(open_model)
    merged = finalize(open_model)
    assert not four_bit(merged)
    tolerance = 1e-6 if dtype is torch.float32 else 2e-2
    for name, layer in plain.named_modules():
        if name in adapted:
            expected = layer.weight.detach() + adapted[name] - rounded[name]
            torch.testing.assert_close(dense(merged.get_submodule(name)), expected, atol=tolerance, rtol=tolerance)
    note = steps[0].note(merged)
    assert "merged onto the dequantized weights" in note
    assert "onto the original ones, as here" in note
    assert not torch.equal(finalize(untouched)(inputs), plain(inputs))  # a copy has the original weights as well


def test_the_merge_onto_rounded_weights_is_reported_as_exact() -> None:
    model = finalize(trained(apply(mlp(), [NF4(block_size=32), LoRA(rank=2, targets=("blocks.*.up",))])))
    note = NF4(block_size=32).note(model)
    assert float(note.partition("within ")[2].split()[0]) < 1e-5
    assert "original" not in note


def test_it_trains_and_ends_plain() -> None:
    model = apply(mlp(), [NF4(block_size=32), LoRA(rank=2, targets=("blocks.*.up",))])
    loss = model(vectors()).square().sum()
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert not four_bit(finalize(model))
