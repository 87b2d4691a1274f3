"""Scales that move between layers: which channels, by how much, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import edgetune as et
from edgetune.capture.recorded import record
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs
from edgetune.core.technique import adapt_defaults
from edgetune.quant.calibration import measure_inputs
from edgetune.quant.channels import find_groups
from edgetune.quant.rounding import Grid, mse_codes
from edgetune.quant.scales import output_error
from support.causal import family
from support.law_models import Mlp
from support.laws import bert, llama, logits, mlp, tokens, vectors


def groups_of(model: nn.Module, inputs: Inputs) -> dict[str, list[str]]:
    groups = find_groups(model, record(model, inputs))
    return {group.producer.layer: list(group.readers) for group in groups}


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes)).eval()  # type: ignore[arg-type]


def test_groups_of_llama_are_its_norms_values_and_up_projections() -> None:
    groups = groups_of(llama(), tokens())
    first = {name: readers for name, readers in groups.items() if ".layers.0." in name}
    block = "model.layers.0."
    assert first == {
        block + "input_layernorm": [block + f"self_attn.{name}_proj" for name in "qkv"],
        block + "self_attn.v_proj": [block + "self_attn.o_proj"],
        block + "post_attention_layernorm": [block + "mlp.gate_proj", block + "mlp.up_proj"],
        block + "mlp.up_proj": [block + "mlp.down_proj"],
    }
    assert groups["model.norm"] == ["lm_head"]
    assert "model.norm" not in groups_of(llama(tied=True), tokens())  # the table would change with the head


def test_query_heads_that_share_a_value_head_share_its_scales() -> None:
    groups = find_groups(llama(), record(llama(), tokens()))
    channels = next(g for g in groups if g.producer.layer.endswith("0.self_attn.v_proj")).readers
    first, second = list(range(8)), list(range(8, 16))  # two value heads of 8, each read by two query heads
    assert channels["model.layers.0.self_attn.o_proj"].tolist() == [*first, *first, *second, *second]


def test_a_norm_that_a_residual_reads_too_is_left_out() -> None:
    names = groups_of(bert(), tokens())
    assert [name for name in names if "LayerNorm" in name] == ["bert.encoder.layer.1.output.LayerNorm"]  # the pooler's
    assert names["bert.encoder.layer.0.attention.self.value"] == ["bert.encoder.layer.0.attention.output.dense"]


def test_groups_of_a_vision_transformer_and_of_torchs_encoder_layer() -> None:
    assert [name.rpartition(".")[2] for name in groups_of(vit(), torch.randn(2, 3, 16, 16))] == [
        "layernorm_before", "v_proj", "layernorm_after", "layernorm",
    ]  # fmt: skip
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True).eval()
    assert groups_of(layer, torch.randn(2, 5, 32)) == {"norm2": ["linear1"], "linear1": ["linear2"]}


def test_a_weight_that_is_read_twice_is_left_out() -> None:
    class ReadBack(nn.Module):
        """Its second weight is used transposed as well."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.encode = nn.Linear(32, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.encode(torch.relu(self.first(x)))) @ self.encode.weight

    assert groups_of(ReadBack().eval(), vectors()) == {}


def test_norms_that_add_one_to_their_weight_are_scaled_as_such() -> None:
    model: Any = family("Gemma")
    block: Any = model.model.layers[0]
    before = 1 + block.input_layernorm.weight.detach().clone()
    columns = block.self_attn.q_proj.weight.detach().clone()
    plain = logits(model, tokens())
    et.apply(model, et.Smooth(), et.Sample.of(tokens()))
    scales = before / (1 + block.input_layernorm.weight)
    assert scales.max() > 1.1 * scales.min()
    torch.testing.assert_close(block.self_attn.q_proj.weight, columns * scales)
    torch.testing.assert_close(logits(model, tokens()), plain, atol=1e-5, rtol=0)


class Fused(nn.Module):
    """One projection for queries, keys and values, as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(rows, length, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.transpose(1, 2).reshape(rows, length, width))


def test_channels_are_followed_through_values_that_are_laid_out_anew() -> None:
    class Joined(Fused):
        """Heads are joined by `contiguous` and `view`, as in Swin, DeBERTa and MobileViT."""

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part.view(2, 5, 4, 8).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
            y = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
            return self.proj(y.permute(0, 2, 1, 3).contiguous().view(2, 5, 32))

    assert groups_of(Joined().eval(), torch.randn(2, 5, 32)) == {"norm": ["qkv"], "qkv": ["proj"]}


def test_of_a_fused_projection_only_the_values_are_free() -> None:
    model = Fused().eval()
    values = find_groups(model, record(model, torch.randn(2, 5, 32)))[1]
    assert values.producer.layer == "qkv"
    assert values.free.nonzero().flatten().tolist() == list(range(64, 96))
    before = model.qkv.weight.detach().clone()
    et.apply(model, et.Smooth(), et.Sample.of(torch.randn(2, 5, 32)))
    rows = (model.qkv.weight * model.norm.weight / before).mean(1)  # without the scales of the norm
    torch.testing.assert_close(rows[:64], torch.ones(64))
    assert ((rows[64:] - 1).abs() > 0.01).sum() > 24


def test_scales_are_those_of_smoothquant() -> None:
    model, x = mlp(), vectors()
    plain: Any = copy.deepcopy(model)
    with torch.no_grad():
        seen = plain.blocks[0].norm(plain.stem(x)).abs().amax(0)
    scales = seen.pow(0.3) / plain.blocks[0].up.weight.abs().amax(0).pow(0.7)
    smooth: Any = et.apply(model, et.Smooth(alpha=0.3), et.Sample.of(x))
    torch.testing.assert_close(smooth.blocks[0].norm.weight, plain.blocks[0].norm.weight / scales)
    torch.testing.assert_close(smooth.blocks[0].norm.bias, plain.blocks[0].norm.bias / scales)
    torch.testing.assert_close(smooth.blocks[0].up.weight, plain.blocks[0].up.weight * scales)
    assert torch.equal(smooth.blocks[0].down.weight, plain.blocks[0].down.weight)


def outliers() -> nn.Module:
    """A model in which two channels of every norm are 50 times as large as the others."""
    model: Any = mlp()
    with torch.no_grad():
        for block in model.blocks:
            block.norm.weight[[3, 17]] *= 50
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("alpha", [0.5, "auto"])
@pytest.mark.parametrize("step", [et.Int4(algorithm="absmax"), et.Int8Dynamic()])
def test_large_channels_no_longer_spoil_quantization(alpha: Any, step: et.Technique) -> None:
    sample = et.Sample.of(vectors())
    exact = logits(outliers(), vectors())

    def error(*steps: et.Technique) -> float:
        return float((logits(et.apply(outliers(), steps, sample), vectors()) - exact).norm() / exact.norm())

    assert error(et.Smooth(alpha=alpha), step) < 0.7 * error(step)


def test_the_search_takes_the_alpha_of_least_error() -> None:
    x, plain = vectors(), outliers()
    smooth: Any = et.apply(outliers(), et.Smooth(alpha="auto"), et.Sample.of(x))
    layer: Any = plain.get_submodule("blocks.0.up")
    seen: list[Tensor] = []
    with layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])), torch.no_grad():
        plain(x)
    chosen = smooth.blocks[0].up.weight.detach()[0] / layer.weight.detach()[0]
    grid = Grid(4, 32, torch.bfloat16)
    mean_square = measure_inputs(plain, {"blocks.0.up": layer}, [x])["blocks.0.up"].mean_square
    torch.testing.assert_close(mean_square, seen[0].square().mean(0))
    size = mean_square.sqrt()
    errors = []
    for n in range(20):
        scales = size.pow(n / 20)
        scales /= (scales.min() * scales.max()).sqrt()
        errors.append(output_error(layer.weight.detach(), scales, grid, seen[0]))
    assert output_error(layer.weight.detach(), chosen, grid, seen[0]) == pytest.approx(min(errors), rel=1e-2)
    assert min(errors) < errors[0]


def test_the_search_is_for_the_grid_that_follows() -> None:
    steps: list[Any] = adapt_defaults([et.Smooth(), et.Int4(group_size=64)])
    assert (steps[0].bits, steps[0].group_size) == (4, 64)
    steps = adapt_defaults([et.Smooth(), et.LoRA(targets=("*",)), et.Int8Dynamic()])
    assert (steps[0].bits, steps[0].group_size) == (8, "channel")
    assert adapt_defaults([et.Smooth(group_size=128), et.Int4()])[0].group_size == 128


def test_awq_rounds_what_large_inputs_multiply_more_closely() -> None:
    sample = et.Sample.of(vectors())
    exact = logits(outliers(), vectors())
    errors = {}
    for algorithm in ("mse", "awq"):
        model = et.apply(outliers(), et.Int4(algorithm=algorithm, group_size="channel", targets=("*.up",)), sample)
        errors[algorithm] = float((logits(model, vectors()) - exact).norm() / exact.norm())
    assert errors["awq"] < 0.8 * errors["mse"]


def test_scales_of_least_error_follow_the_importance_of_the_inputs() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(32)
    importance[3] = 1e6
    grid = Grid(4, 32)
    plain, weighted = (mse_codes(weight, grid, each) for each in (None, importance))
    off = [(each.codes * each.scales - weight)[:, 3].abs() for each in (plain, weighted)]
    assert (off[1] <= off[0]).all()
    assert off[1].sum() < 0.5 * off[0].sum()
    assert torch.equal(mse_codes(weight, grid, torch.ones(32)).codes, plain.codes)


def test_constant_and_zero_channels_keep_finite_scales() -> None:
    model: Any = mlp()
    with torch.no_grad():
        model.blocks[0].norm.weight[5] = model.blocks[0].norm.bias[5] = 0.0  # an input that is always zero
        model.blocks[0].norm.weight[6] = 0.0
        model.blocks[0].norm.bias[6] = 3.0  # always the same
        model.blocks[0].up.weight[:, 7] = 0.0
    before = logits(model, vectors())
    for alpha in (0.5, 0.0, 1.0, "auto"):
        smooth = et.apply(copy.deepcopy(model), et.Smooth(alpha=alpha), et.Sample.of(vectors()))
        assert all(bool(torch.isfinite(p).all()) for p in smooth.parameters())
        torch.testing.assert_close(logits(smooth, vectors()), before, atol=1e-5, rtol=0)


def test_padding_does_not_count() -> None:
    model, x = llama(), tokens()
    assert isinstance(x, dict)
    x["attention_mask"][:, 6:] = 0
    linear: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    other = {**x, "input_ids": torch.where(x["attention_mask"].bool(), x["input_ids"], 9)}
    sizes = [measure_inputs(model, {"q": linear}, [batch])["q"] for batch in (x, other)]
    assert torch.equal(sizes[0].largest, sizes[1].largest)
    assert torch.equal(sizes[0].mean_square, sizes[1].mean_square)


class Shared(Mlp):
    """One norm for all blocks."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.norm = self.blocks[0].norm


def with_value(name: str, value: float) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = mlp()
        with torch.no_grad():
            model.get_parameter(name)[0, 0] = value
        return model

    return build


@pytest.mark.parametrize(
    ("build", "batches", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 3)).eval(),
            None,
            "Sequential has no channels",
        ),
        (lambda: Shared().eval(), None, "Shared has no channels"),
        (with_value("blocks.1.up.weight", float("inf")), None, r"blocks.1.up: a weight is NaN or infinite"),
        (mlp, [torch.full((2, 32), float("nan"))], "not finite on the calibration batches: blocks.0.up"),
        (mlp, [], "no calibration batches"),
        (mlp, [torch.zeros(0, 32)], "no calibration batches"),
    ],
)
@pytest.mark.parametrize("alpha", [0.5, "auto"])
def test_refusals_leave_the_model_as_it_was(
    build: Callable[[], nn.Module], batches: list[Tensor] | None, message: str, alpha: Any
) -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    sample = et.Sample.of(vectors()) if batches is None else et.Sample(vectors(), lambda: iter(batches))
    with pytest.raises(EdgetuneError, match=f"smooth.*{message}"):
        et.apply(model, et.Smooth(alpha=alpha), sample)
    assert all(torch.equal(tensor.nan_to_num(), before[n].nan_to_num()) for n, tensor in model.state_dict().items())


def test_a_quantized_model_and_one_with_adapters_are_refused() -> None:
    quantized = et.apply(mlp(), et.Int4(algorithm="absmax"))
    with pytest.raises(EdgetuneError, match="cannot follow int4"):
        et.apply(quantized, et.Smooth(), et.Sample.of(vectors()))
    with pytest.raises(EdgetuneError, match="needs weights in floating point"):
        et.Smooth().apply(quantized, et.Sample.of(vectors()))
    adapted = et.apply(mlp(), et.LoRA(targets=("*.up",)))
    with pytest.raises(EdgetuneError, match="needs plain layers"):
        et.Smooth().apply(adapted, et.Sample.of(vectors()))


class Unrecorded(Mlp):
    """Reads a norm in all forwards but the first, which is recorded."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = super().forward(x)
        return y if self.calls == 1 else y + self.blocks[0].norm(self.stem(x)).square().sum(-1, keepdim=True)


def test_outputs_that_change_bring_the_weights_back() -> None:
    model = Unrecorded().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(EdgetuneError, match="outputs of Unrecorded on the sample change by"):
        et.apply(model, et.Smooth(), et.Sample.of(vectors()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
