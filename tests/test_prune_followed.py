"""Structured pruning follows a width through fused, stored-transposed and rearranged layers, or refuses by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgetune as et
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs, call, logits_of
from edgetune.core.technique import Sample
from edgetune.prune.groups import Cut
from edgetune.prune.structured import Prune
from support.pruned import by_weight, count


class Residual(nn.Module):
    """An inverted bottleneck with a depthwise convolution, a residual sum, and a flatten before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.expand, self.deep = nn.Conv2d(16, 48, 1), nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.deep_norm, self.project = nn.BatchNorm2d(48), nn.Conv2d(48, 16, 1)
        self.head = nn.Linear(16 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = x + self.project(torch.relu(self.deep_norm(self.deep(torch.relu(self.expand(x))))))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


class Vit(nn.Module):
    """A fused qkv, as timm writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 8
        self.qkv, self.proj, self.head = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(rows, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, tokens, -1)
        return self.head(x + self.proj(mixed)).mean(1)


def test_depthwise_residual_and_flatten_follow() -> None:
    torch.manual_seed(0)
    model, inputs = Residual().eval(), torch.randn(2, 3, 8, 8)
    by_weight(ratio=0.5).apply(model, Sample.of(inputs))
    assert (model.stem.out_channels, model.norm.num_features, model.project.out_channels) == (8, 8, 8)
    assert model.expand.weight.shape[:2] == (24, 8)
    assert (model.deep.groups, model.deep.in_channels, model.deep.weight.shape) == (24, 24, (24, 1, 3, 3))
    assert model.deep_norm.running_mean.shape == (24,)
    assert model.head.weight.shape == (5, 8 * 4)
    model(inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_fused_qkv_follows() -> None:
    torch.manual_seed(0)
    model, inputs = Vit().eval(), torch.randn(2, 5, 32)
    dropped = by_weight(what={"heads"}, ratio=0.25).plan(model, Sample.of(inputs))[0].drop
    with torch.no_grad():
        held = copy.deepcopy(model)
        held.proj.weight[:, dropped[0] * 8 : dropped[0] * 8 + 8] = 0
        by_weight(what={"heads"}, ratio=0.25).apply(model, Sample.of(inputs))
        assert (model.num_heads, model.qkv.out_features, model.proj.in_features) == (3, 72, 24)
        torch.testing.assert_close(model(inputs), held(inputs))


def test_attention_with_raw_parameters_is_refused_for_heads_and_works_for_the_ffn() -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
    model, inputs = nn.Sequential(block, nn.Linear(16, 2)).eval(), torch.randn(2, 4, 16)
    with pytest.raises(EdgetuneError, match="one raw parameter"):
        by_weight(what={"heads"}).apply(model, Sample.of(inputs))
    prune = by_weight(ratio=0.5)
    prune.apply(model, Sample.of(inputs))
    assert prune.note(model) == "left as they are: 0.self_attn (queries, keys and values in one raw parameter)"
    assert model[0].linear1.out_features == model[0].linear2.in_features == 16


def held(model: nn.Module, plan: tuple[Cut, ...], inputs: Inputs) -> Tensor:
    """What the model says with the planned units at zero where they are read: written apart from the code's own."""
    zeroed = [(m, [p for unit in one.drop for p in m.of_unit[unit]]) for one in plan for m in one.group.along("in")]
    handles = []
    for member, positions in zeroed:
        layer = model.get_submodule(member.layer)
        dimension = 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1

        def zero(_: nn.Module, args: tuple[Tensor], p: list[int] = positions, d: int = dimension) -> tuple[Tensor]:
            return (args[0].index_fill(d, torch.tensor(p), 0.0),)

        handles.append(layer.register_forward_pre_hook(zero))
    with torch.no_grad():
        output = logits_of(call(model, inputs))
    for handle in handles:
        handle.remove()
    return output


def check_pruned(model: nn.Module, inputs: Inputs, prune: Prune) -> tuple[Cut, ...]:
    """Prune, and compare with the same units at zero; every weight is large enough for a mistake to show."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    plan = prune.plan(model, Sample.of(inputs))
    expected, before = held(model, plan, inputs), count(model)
    prune.apply(model, Sample.of(inputs))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(call(model, inputs)), expected, rtol=1e-4, atol=1e-4)
    assert count(model) < before
    return plan


IDS = torch.randint(3, 48, (2, 8), generator=torch.Generator().manual_seed(0))


WORDS = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **WORDS}


T5 = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2, "vocab_size": 48}


LARGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


PHI3 = {**LARGE, "num_key_value_heads": 2, **WORDS}


FUSED = {**LARGE, "vocab_size": 48, "bos_token_id": 1, "eos_token_id": 2}


def transformer(kind: str, **settings: object) -> Any:
    import transformers

    architecture = getattr(transformers, kind)
    return architecture(architecture.config_class(use_cache=False, **settings)).eval()


# architecture, settings, what is cut, a layer and the shape of its weight afterwards
FOLLOWED: dict[str, tuple[str, dict[str, Any], str, str, tuple[int, int]]] = {
    "GPT-2's FFN, stored (in, out)": ("GPT2LMHeadModel", GPT2, "ffn", "transformer.h.0.mlp.c_fc", (32, 64)),
    "GPT-2's heads": ("GPT2LMHeadModel", GPT2, "heads", "transformer.h.1.attn.c_attn", (32, 48)),
    "Phi-3's gate and up in one": ("Phi3ForCausalLM", PHI3, "ffn", "model.layers.1.mlp.gate_up_proj", (64, 32)),
    "GPT-NeoX's heads, one after the other": (
        "GPTNeoXForCausalLM", FUSED, "heads", "gpt_neox.layers.0.attention.query_key_value", (48, 32),
    ),
    "Falcon's heads in groups": (
        "FalconForCausalLM", {**FUSED, "num_kv_heads": 2, "new_decoder_architecture": True}, "heads",
        "transformer.h.0.self_attention.query_key_value", (32, 32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLLOWED)
def test_fused_and_transposed_linears_follow(case: str) -> None:
    kind, settings, what, layer, shape = FOLLOWED[case]
    model = transformer(kind, **settings)
    check_pruned(model, {"input_ids": IDS}, by_weight(what={what}, ratio=0.5, round_to=4))
    assert tuple(model.get_submodule(layer).weight.shape) == shape


def test_gate_and_up_in_one_layer_lose_the_same_units() -> None:
    model = transformer("Phi3ForCausalLM", **PHI3)
    plan = check_pruned(model, {"input_ids": IDS}, by_weight(what={"ffn"}, ratio=0.5))
    writer, reader = plan[0].group.members
    assert (writer.of_unit[5], reader.of_unit[5]) == ((5, 69), (5,))
    assert model.config.intermediate_size == 32


@pytest.mark.parametrize("projection", ["relu", "gated-gelu"])
def test_t5s_heads_go_in_all_blocks_alike_and_so_does_its_ffn(projection: str) -> None:
    model = transformer("T5ForConditionalGeneration", feed_forward_proj=projection, **T5)
    plan = check_pruned(model, {"input_ids": IDS, "decoder_input_ids": IDS}, by_weight(ratio=0.5))
    shared = [one.group for one in plan if len(one.group.attentions) == 2]
    assert [group.name.split(".")[-1] for group in shared] == ["SelfAttention", "SelfAttention", "EncDecAttention"]
    assert all(any("relative_attention_bias" in m.layer for m in group.members) for group in shared[:2])
    assert model.decoder.block[1].layer[2].DenseReluDense.wo.weight.shape == (32, 32)
    assert model.decoder.block[1].layer[1].EncDecAttention.n_heads == 2
    assert (model.config.d_ff, model.config.num_heads) == (32, 2)


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "Phi3ForCausalLM"])
def test_what_was_cut_is_saved_and_loaded_by_transformers(kind: str, tmp_path: Path) -> None:
    model = transformer(kind, **(GPT2 if kind == "GPT2LMHeadModel" else PHI3))
    by_weight(what={"ffn"}, ratio=0.5).apply(model, Sample.of({"input_ids": IDS}))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_pruned_gpt2_is_saved_and_loaded(tmp_path: Path) -> None:
    model = transformer("GPT2LMHeadModel", **GPT2)
    by_weight(ratio=0.5).apply(model, Sample.of({"input_ids": IDS}))
    et.save_pretrained(model, tmp_path)
    loaded = et.load_pretrained(tmp_path)
    assert (loaded.transformer.h[0].attn.num_heads, loaded.transformer.h[0].attn.split_size) == (2, 16)
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


class Upscaling(nn.Module):
    """A transposed convolution, a depthwise one that widens the picture, and a pixel shuffle between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.up, self.norm = nn.ConvTranspose2d(16, 12, 4, stride=2, padding=1), nn.BatchNorm2d(12)
        self.spread = nn.ConvTranspose2d(12, 12, 2, stride=2, groups=12)
        self.wide, self.shuffle = nn.Conv2d(12, 64, 3, padding=1), nn.PixelShuffle(2)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.spread(self.norm(self.up(self.first(x).relu())).relu())
        return self.last(self.shuffle(self.wide(x)).relu())


def test_transposed_convolutions_and_a_pixel_shuffle_follow() -> None:
    model = Upscaling().eval()
    plan = check_pruned(model, torch.randn(2, 3, 4, 4), by_weight(ratio=0.5, round_to=2))
    assert model.up.weight.shape == (8, 6, 4, 4)
    assert (model.up.in_channels, model.up.out_channels) == (8, 6)
    assert (model.spread.groups, model.spread.weight.shape) == (6, (6, 1, 2, 2))
    assert model.wide.weight.shape == (32, 6, 3, 3)
    assert model.last.in_channels == 8
    (shuffled,) = [one.group for one in plan if one.group.name == "wide"]
    assert shuffled.members[0].of_unit[3] == (12, 13, 14, 15), "the four pixels of a channel go together"


class ReadDirectly(nn.Module):
    """A block whose parts read the weights of their layers themselves."""

    def __init__(self, heads: bool, ffn: bool) -> None:
        super().__init__()
        self.num_heads, self.heads, self.ffn = 4, heads, ffn
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        qkv = nn.functional.linear(x, self.qkv.weight, self.qkv.bias) if self.heads else self.qkv(x)
        q, k, v = qkv.reshape(rows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, tokens, -1)
        x = self.norm(x + self.proj(mixed))
        hidden = nn.functional.linear(x, self.fc1.weight, self.fc1.bias) if self.ffn else self.fc1(x)
        return x + self.fc2(hidden.relu())


@pytest.mark.parametrize(("what", "layer"), [("heads", "0.qkv"), ("ffn", "0.fc1")])
def test_a_weight_that_is_read_directly_follows(what: str, layer: str) -> None:
    model = nn.Sequential(ReadDirectly(what == "heads", what == "ffn"), ReadDirectly(False, False), nn.Linear(32, 3))
    plan = check_pruned(model.eval(), torch.randn(2, 6, 32), by_weight(what={what}, ratio=0.5))
    assert [one.group.name for one in plan] == (["0", "1"] if what == "heads" else ["0.fc1", "1.fc1"])
    assert model.get_submodule(layer).weight.shape == (48 if what == "heads" else 32, 32)


class Rearranged(nn.Module):
    """Between two convolutions: a rearrangement that mixes channels, or a normed weight."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.plain, self.first = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(64 if kind == "unshuffle" else 16, 2, 1)
        if kind == "normed":
            self.first = nn.utils.parametrizations.weight_norm(self.first)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.plain(x).relu())
        if self.kind == "unshuffle":
            return self.last(nn.functional.pixel_unshuffle(x, 2))
        if self.kind == "transpose":
            return self.last(x.flatten(2).transpose(1, 2).reshape(x.shape))
        return self.last(x)


def test_a_layer_that_cannot_be_followed_stays_and_is_named() -> None:
    torch.manual_seed(0)
    model, prune = Rearranged("transpose").eval(), by_weight(ratio=0.5)
    prune.apply(model, Sample.of(torch.randn(2, 3, 4, 4)))
    assert (model.plain.out_channels, model.first.out_channels) == (8, 16)
    assert prune.note(model).startswith("left as they are: first (read by ")
    normed = Rearranged("normed").eval()
    with pytest.raises(EdgetuneError, match=r"plain \(read by _weight_norm\); first \(.*computes its weight\)"):
        prune.apply(normed, Sample.of(torch.randn(2, 3, 4, 4)))
    assert normed.plain.out_channels == 16


def test_channels_follow_pixels_that_become_channels() -> None:
    model = Rearranged("unshuffle").eval()
    check_pruned(model, torch.randn(2, 3, 4, 4), by_weight(ratio=0.5))
    assert (model.first.out_channels, model.last.in_channels) == (8, 32)


def test_experts_in_raw_parameters_are_named() -> None:
    settings = {**PHI3, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = transformer("MixtralForCausalLM", **settings)
    with pytest.raises(EdgetuneError, match=r"layers\.1\.mlp\.experts \(experts whose weights are raw parameters"):
        by_weight(what={"ffn"}).apply(model, Sample.of({"input_ids": IDS}))


def test_code_that_counts_on_a_width_is_named() -> None:
    model = transformer("GPTBigCodeForCausalLM", **GPT2)
    with pytest.raises(EdgetuneError, match=r"transformer\.h\.0\.attn.*does not run.*split_sizes"):
        by_weight(what={"heads"}, ratio=0.5).apply(model, Sample.of({"input_ids": IDS}))


GROUPED = {
    "groups": [nn.Conv2d(4, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 64, 3, groups=8), nn.ReLU(), nn.Conv2d(64, 2, 1)],
    "multiplier": [nn.Conv2d(4, 16, 3), nn.Conv2d(16, 32, 3, groups=16), nn.ReLU(), nn.Conv2d(32, 2, 1)],
    "one dimension": [nn.Conv1d(4, 32, 3), nn.Conv1d(32, 64, 3, groups=8), nn.ReLU(), nn.Conv1d(64, 2, 1)],
}


@pytest.mark.parametrize("kind", GROUPED)
@pytest.mark.parametrize("importance", ["magnitude", "activation", "flap"])
def test_convolutions_in_groups_follow(kind: str, importance: str) -> None:
    model = copy.deepcopy(nn.Sequential(*GROUPED[kind])).eval()
    x = torch.randn(2, 4, *[8] * (model[0].weight.dim() - 2))
    if importance == "magnitude":
        check_pruned(model, x, by_weight(ratio=0.5))
    else:
        Prune(ratio=0.5, importance=importance).apply(model, Sample.of(x))
    grouped = next(layer for layer in model if getattr(layer, "groups", 1) > 1)
    assert grouped.groups == (8 if kind == "multiplier" else 4)
    assert model(x).shape[1] == 2


def test_a_transposed_convolution_in_groups_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(4, 32, 3), nn.ConvTranspose2d(32, 64, 2, groups=8), nn.ReLU(), nn.Conv2d(64, 2, 1))
    with pytest.raises(EdgetuneError, match=r"1 \(ConvTranspose2d with 8 groups\)"):
        Prune(ratio=0.5).apply(model.eval(), Sample.of(torch.randn(2, 4, 8, 8)))
