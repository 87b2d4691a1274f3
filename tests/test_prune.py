"""Structured pruning: widths, attributes and configs follow the cut; what importance drops; what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import edgetune as et
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import call, logits_of
from edgetune.core.modes import preserve_state, preserve_trainability
from edgetune.core.technique import Sample
from edgetune.prune.groups import find_groups
from edgetune.prune.importance import magnitude_scores
from edgetune.prune.structured import Prune
from support.pruned import TOKENS, bert, bert_inputs, by_weight, count, llama, mlp


def test_bert_widths_attributes_and_config_follow_the_cut() -> None:
    model = bert()
    model.train()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    before = count(model)
    Prune(ratio=0.3).apply(model, Sample.of(bert_inputs()))
    for layer in model.bert.encoder.layer:
        own = layer.attention.self
        assert (own.num_attention_heads, own.attention_head_size, own.all_head_size) == (3, 6, 18)
        assert own.query.weight.shape == own.key.weight.shape == own.value.weight.shape == (18, 24)
        assert layer.attention.output.dense.weight.shape == (24, 18)
        assert layer.intermediate.dense.weight.shape == (24, 24)  # 32 * 0.7 = 22.4, to the nearest multiple of 8
        assert layer.output.dense.in_features == 24
    assert model.config.intermediate_size == 24
    # per layer: one head of 6 in q, k, v (with bias) and in the output; 8 units in both linears
    assert before - count(model) == 2 * (3 * 6 * 25 + 6 * 24 + 8 * 25 + 8 * 24)
    assert model.training
    assert model.bert.encoder.layer[0].output.dropout.training
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen
    assert logits_of(call(model, bert_inputs())).shape == (2, 3)


def test_macs_fall() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def flops(model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call(model, bert_inputs())
        total: int = counter.get_total_flops()
        return total

    model = bert(attn_implementation="eager")
    before = flops(model)
    Prune(ratio=0.5).apply(model, Sample.of(bert_inputs()))
    # 12 rows of tokens, 2 operations a MAC: half of q, k, v, output and FFN; half of two attention products
    linears, products = 12 * 2 * (4 * 12 * 24 + 2 * 16 * 24), 2 * 2 * 2 * (2 * 6 * 6 * 6)
    assert before - flops(model) == 2 * (linears + products)


@pytest.mark.parametrize("importance", ["magnitude", "activation"])
def test_two_applications_agree_bit_for_bit(importance: str) -> None:
    models = [bert(), bert()]
    for model in models:
        Prune(importance=importance).apply(model, Sample.of(bert_inputs()))
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_ffn_pruned_bert_is_saved_and_loaded_by_transformers(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    model = bert()
    Prune(what={"ffn"}, ratio=0.5).apply(model, Sample.of(bert_inputs()))
    model.save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.intermediate_size == 16
    assert torch.equal(call(loaded, bert_inputs()).logits, call(model, bert_inputs()).logits)


def test_head_pruned_bert_is_loaded_by_what_stands_beside_its_config(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    model = bert()
    Prune(ratio=0.5).apply(model, Sample.of(bert_inputs()))
    et.save_pretrained(model, tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        BertForSequenceClassification.from_pretrained(tmp_path)
    loaded = et.load_pretrained(tmp_path)
    assert type(loaded) is BertForSequenceClassification
    assert loaded.bert.encoder.layer[1].attention.self.num_attention_heads == 2
    assert torch.equal(call(loaded, bert_inputs()).logits, call(model, bert_inputs()).logits)
    Prune(ratio=0.5).apply(loaded, Sample.of(bert_inputs()))
    et.save_pretrained(loaded, tmp_path)
    again = et.load_pretrained(tmp_path)
    assert again.bert.encoder.layer[1].attention.self.num_attention_heads == 1
    assert torch.equal(call(again, bert_inputs()).logits, call(loaded, bert_inputs()).logits)


def test_any_module_is_loaded_into_the_network_as_it_was(tmp_path: Path) -> None:
    model, inputs = mlp(), torch.randn(4, 6)
    Prune(ratio=0.5).apply(model, Sample.of(inputs))
    et.save_pretrained(model, tmp_path)
    loaded = et.load_pretrained(tmp_path, mlp())
    assert torch.equal(loaded(inputs), model(inputs))
    small = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    with pytest.raises(EdgetuneError, match=r"0 cannot be cut.*weight \(8, 6\) -> \(16, 6\)"):
        et.load_pretrained(tmp_path, small)
    with pytest.raises(EdgetuneError, match="there is no saved model"):
        et.load_pretrained(tmp_path / "none", mlp())


def test_llama_drops_query_heads_with_their_key_value_head_and_loads_again(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model, inputs = llama(), {"input_ids": TOKENS}
    Prune(ratio=0.3).apply(model, Sample.of(inputs))
    for layer in model.model.layers:
        own = layer.self_attn
        assert own.q_proj.weight.shape == (32, 24)  # 4 of 6 heads of 8
        assert own.k_proj.weight.shape == own.v_proj.weight.shape == (16, 24)  # 2 of 3
        assert own.o_proj.weight.shape == (24, 32)
        assert own.num_key_value_groups == 2
        assert layer.mlp.gate_proj.out_features == layer.mlp.up_proj.out_features == layer.mlp.down_proj.in_features
        assert layer.mlp.down_proj.in_features == layer.mlp.intermediate_size == 32  # 28, halfway, goes up
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert config.intermediate_size == 32
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(call(loaded, inputs).logits, call(model, inputs).logits)
    assert loaded.generate(TOKENS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 9)


def test_plain_mlp_and_what_is_left_is_the_rest_of_the_model() -> None:
    model, inputs = mlp(), torch.randn(4, 6)
    plan = by_weight(ratio=0.5).plan(model, Sample.of(inputs))
    assert [str(one) for one in plan] == ["channels 0: 32 -> 16", "channels 2: 16 -> 8"]
    assert str(plan[0].group) == "channels 0: 32 units in 0 (out 32), 2 (in 32)"
    held = copy.deepcopy(model)
    with torch.no_grad():
        held[2].weight[:, list(plan[0].drop)] = 0
        held[4].weight[:, list(plan[1].drop)] = 0
    by_weight(ratio=0.5).apply(model, Sample.of(inputs))
    torch.testing.assert_close(model(inputs), held(inputs))
    assert [tuple(model[i].weight.shape) for i in (0, 2, 4)] == [(16, 6), (8, 16), (3, 8)]


def test_activation_drops_silent_units_and_folds_constant_ones_into_the_bias() -> None:
    model, inputs = mlp(), torch.randn(64, 6)
    with torch.no_grad():
        model[0].weight[3:7], model[0].bias[3:7] = 0, -5.0  # silent: the largest bias norms, no output
        model[0].weight[7:11], model[0].bias[7:11] = 0, 5.0  # constant: a large output that never changes
    sample, before = Sample.of(inputs), model(inputs).detach()
    plan = Prune(ratio=0.25, importance="activation").plan(model, sample)
    assert plan[0].drop == tuple(range(3, 11))
    weighed = by_weight(ratio=0.25).plan(model, sample)
    assert not set(weighed[0].drop) & set(range(3, 11))
    Prune(ratio=0.25, importance="activation", skip=("4",)).apply(model, sample)
    torch.testing.assert_close(model(inputs), before, rtol=1e-4, atol=1e-4)
    assert model[0].out_features == 24


def test_padding_does_not_count_as_activation() -> None:
    inputs = bert_inputs()
    other = {**inputs, "input_ids": TOKENS.clone()}
    other["input_ids"][1, 4:] = 49
    plans = [Prune(importance="activation").plan(bert(), Sample.of(given)) for given in (inputs, other)]
    assert plans[0] == plans[1]


def test_head_importance_is_the_norm_of_its_own_map() -> None:
    model = bert()
    with preserve_state(model), preserve_trainability(model):
        group = find_groups(model, bert_inputs(), {"heads"}, ()).groups[1]
    layer = model.bert.encoder.layer[1].attention
    value = torch.cat([layer.self.value.weight, layer.self.value.bias[:, None]], 1).double()
    read = layer.output.dense.weight.double()
    maps = [torch.linalg.norm(read[:, h * 6 : h * 6 + 6] @ value[h * 6 : h * 6 + 6]) for h in range(4)]
    torch.testing.assert_close(magnitude_scores(model, group), torch.stack(maps).detach())


def test_skip_leaves_a_block_alone_and_the_config_unchanged() -> None:
    model = bert()
    Prune(skip=("bert.encoder.layer.0",)).apply(model, Sample.of(bert_inputs()))
    widths = [layer.intermediate.dense.out_features for layer in model.bert.encoder.layer]
    assert widths == [32, 24]
    assert [layer.attention.self.num_attention_heads for layer in model.bert.encoder.layer] == [4, 3]
    assert model.config.intermediate_size == 32  # one number cannot say two widths


@pytest.mark.parametrize("kind", ["ffn", "heads"])
def test_separate_ratios(kind: str) -> None:
    model = bert()
    settings = {"ffn_ratio": 0.0} if kind == "heads" else {"head_ratio": 0.0}
    Prune(ratio=0.5, **settings).apply(model, Sample.of(bert_inputs()))
    layer = model.bert.encoder.layer[0]
    heads, width = layer.attention.self.num_attention_heads, layer.intermediate.dense.out_features
    assert (heads, width) == ((2, 32) if kind == "heads" else (4, 16))


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_a_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="ratio"):
        Prune(ratio=ratio)


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        (Prune(ratio=0), "every ratio is zero"),
        (Prune(what={"heads"}), "has no heads"),
        (Prune(ratio=0.05), "rounding leaves every width of channels as it is"),
        (Prune(skip=("nowhere.*",)), "matches no layer"),
        (Prune(skip=("*",)), "nothing to prune"),
    ],
)
def test_errors_leave_the_model_alone(prune: Prune, message: str) -> None:
    model = mlp()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(EdgetuneError, match=message):
        prune.apply(model, Sample.of(torch.randn(2, 6)))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_sample_is_needed() -> None:
    with pytest.raises(EdgetuneError, match="needs example inputs"):
        Prune().apply(mlp())


def test_rounding_of_heads_that_changes_nothing_raises_although_the_ffn_would_change() -> None:
    with pytest.raises(EdgetuneError, match="rounding leaves every width of heads"):
        Prune(ratio=0.3, head_ratio=0.1).apply(bert(), Sample.of(bert_inputs()))


def test_layers_that_share_a_weight_are_cut_as_one_and_go_on_sharing_it(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 2)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu() + self.second(-x).relu())

    torch.manual_seed(0)
    model, inputs = Twice(), torch.randn(4, 6)
    plan = by_weight(ratio=0.5).plan(model, Sample.of(inputs))
    held = copy.deepcopy(model)
    with torch.no_grad():
        held.last.weight[:, list(plan[0].drop)] = 0
    by_weight(ratio=0.5).apply(model, Sample.of(inputs))
    assert model.first.weight is model.second.weight
    assert model.first.weight.shape == (8, 6)
    torch.testing.assert_close(model(inputs), held(inputs))
    et.save_pretrained(model, tmp_path)
    assert torch.equal(et.load_pretrained(tmp_path, Twice())(inputs), model(inputs))


def test_a_weight_whose_outputs_it_reads_itself_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    model[2].weight = model[0].weight
    with pytest.raises(EdgetuneError, match=r"0 \(read by the model's inputs or constants\)"):
        Prune(ratio=0.5).apply(model, Sample.of(torch.randn(2, 16)))


class FixedView(nn.Module):
    """Reads a width as a number in its code, or through a mean over the channels."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.first, self.last, self.mean = nn.Linear(6, 32), nn.Linear(32, 2), mean

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return (
            self.last(hidden - hidden.mean(-1, keepdim=True))
            if self.mean
            else self.last(hidden.view(-1, 4, 8).flatten(1))
        )


@pytest.mark.parametrize("mean", [True, False])
def test_a_width_read_elsewhere_is_found_and_the_model_put_back(mean: bool) -> None:
    torch.manual_seed(0)
    model, inputs = FixedView(mean), torch.randn(4, 6)
    before = model(inputs).detach()
    with pytest.raises(EdgetuneError, match=r"first \(read by mean\)" if mean else "read elsewhere"):
        Prune(ratio=0.25).apply(model, Sample.of(inputs))
    assert model.first.out_features == 32
    assert torch.equal(model(inputs), before)


def test_a_norm_over_the_channels_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 2))
    with pytest.raises(EdgetuneError, match=r"1 \(LayerNorm\)"):
        Prune().apply(model, Sample.of(torch.randn(2, 6)))


def test_pruning_one_model_does_not_touch_the_next() -> None:
    first, second = llama(), llama(heads=4, kv_heads=4)
    for model, expected in ((first, (4, 2)), (second, (3, 3))):
        Prune().apply(model, Sample.of({"input_ids": TOKENS}))
        own = model.model.layers[0].self_attn
        assert (own.q_proj.out_features // 8, own.k_proj.out_features // 8) == expected


def test_a_wrapped_layer_is_refused() -> None:
    from edgetune.core.wrapped import Wrapped

    model = mlp()
    model[2] = Wrapped(model[2])
    with pytest.raises(EdgetuneError, match="plain layers"):
        Prune().apply(model, Sample.of(torch.randn(2, 6)))


def test_settings_survive_json() -> None:
    prune = Prune(ratio=0.4, what={"ffn"}, importance="activation", skip=("head",))
    assert Prune.model_validate_json(prune.model_dump_json()) == prune


def test_nothing_to_prune_says_what_was_seen_and_why_it_was_left_out() -> None:
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))
    with pytest.raises(EdgetuneError) as caught:
        Prune(ratio=0.5, skip=("2",)).apply(model, Sample.of(torch.randn(2, 6)))
    assert caught.value.what == (
        "nothing to prune: no layer can be cut as channels; seen: 0, 2 (in skip); 4 (writes the model's output)"
    )


def test_a_mistake_that_the_output_hides_is_seen_at_the_layer() -> None:
    """The block adds next to nothing to the output, as blocks with a small layer scale do."""

    class Hidden(FixedView):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return x[:, :2] + 1e-9 * self.last(hidden * hidden.shape[-1])

    torch.manual_seed(0)
    with pytest.raises(EdgetuneError, match="first: the output of last is off by"):
        Prune(ratio=0.25).apply(Hidden(mean=True), Sample.of(torch.randn(4, 6)))


def test_query_heads_that_read_one_head_of_keys_go_by_themselves(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model, inputs = llama(heads=6, kv_heads=1), {"input_ids": TOKENS}
    Prune(what={"heads"}, ratio=0.5).apply(model, Sample.of(inputs))
    own = model.model.layers[0].self_attn
    assert (own.q_proj.out_features, own.v_proj.out_features, own.num_key_value_groups) == (24, 8, 3)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(call(loaded, inputs).logits, call(model, inputs).logits)


def test_what_cannot_be_cut_stays_and_is_named() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.second = nn.Conv2d(3, 16, 1), nn.GroupNorm(4, 16), nn.Conv2d(16, 24, 1)
            self.last = nn.Conv2d(24, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.second(self.norm(self.first(x))).relu())

    torch.manual_seed(0)
    model, prune = Normed().eval(), Prune(ratio=0.5)
    prune.apply(model, Sample.of(torch.randn(2, 3, 4, 4)))
    assert (model.first.out_channels, model.second.out_channels) == (16, 16)
    assert prune.note(model) == "left as they are: first (read by norm (GroupNorm))"
