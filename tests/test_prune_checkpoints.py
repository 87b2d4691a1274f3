"""What was cut is saved and loaded again, in whatever order it was cut; what the batches cannot say is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgetune as et
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import call, logits_of
from edgetune.core.technique import Sample
from support.pruned import TOKENS, bert, bert_inputs, by_weight

DEPTH, WIDTH = et.Depth(blocks=(0, 2)), by_weight(ratio=0.5)
ORDERS = {
    "depth": [DEPTH], "depth, depth": [DEPTH, et.Depth(blocks=(1,))], "depth, width": [DEPTH, WIDTH],
    "width, depth": [WIDTH, DEPTH], "width, depth, width": [WIDTH, DEPTH, WIDTH], "width, width": [WIDTH, WIDTH],
}  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.filterwarnings("ignore:the config of BertForSequenceClassification cannot say")
def test_cuts_in_any_order_come_back(order: str, tmp_path: Path) -> None:
    model = bert(num_hidden_layers=3)
    for step in ORDERS[order]:
        step.apply(model, Sample.of(bert_inputs()))
    et.save_pretrained(model, tmp_path)
    loaded = et.load_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.to_dict()["intermediate_size"] == model.config.intermediate_size
    assert torch.equal(logits_of(call(loaded, bert_inputs())), logits_of(call(model, bert_inputs())))


def test_a_head_size_that_the_config_would_guess_is_the_saved_one(tmp_path: Path) -> None:
    from transformers import MPNetConfig, MPNetForSequenceClassification

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    model = MPNetForSequenceClassification(MPNetConfig(vocab_size=50, max_position_embeddings=16, **sizes)).eval()
    inputs = {"input_ids": TOKENS + 3}
    by_weight(what={"heads"}, ratio=0.5).apply(model, Sample.of(inputs))
    et.save_pretrained(model, tmp_path)
    loaded: Any = et.load_pretrained(tmp_path)
    assert loaded.mpnet.encoder.layer[0].attention.attn.attention_head_size == 6
    assert torch.equal(logits_of(call(loaded, inputs)), logits_of(call(model, inputs)))


def labelled(inputs: Tensor, labels: Tensor) -> Sample:
    def loss(logits: Tensor, wanted: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.float(), wanted)

    return Sample(inputs[: len(labels)], lambda: iter([inputs]), lambda: iter([(inputs[: len(labels)], labels)]), loss)


@pytest.mark.parametrize("importance", ["activation", "taylor"])
def test_sums_over_many_rows_in_16_bits_stay_finite(importance: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)).half()
    sample = labelled((torch.randn(4000, 8) * 10).half(), torch.randint(0, 2, (4,)))
    et.Prune(ratio=0.5, importance=importance).apply(model, sample)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


class SequenceFirst(nn.Module):
    """Its layers see `(tokens, rows, width)`."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x.transpose(0, 1)).relu()).mean(0)


@pytest.mark.parametrize("tokens", [6, 7])
def test_the_loss_of_each_row_needs_rows_first(tokens: int) -> None:
    sample = labelled(torch.randn(3, tokens, 8), torch.randint(0, 2, (3,)))
    with pytest.raises(EdgetuneError, match=r"the inputs of down do not begin with the rows"):
        et.Prune(ratio=0.5, importance="taylor").apply(SequenceFirst(), sample)


class Routed(nn.Module):
    """Two experts, of which each sees the rows that are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert, rows in zip(self.experts, (torch.where(x[:, 0] > 0)[0], torch.where(x[:, 0] <= 0)[0]), strict=True):
            y = y.index_add(0, rows, expert(x[rows]))
        return self.head(y)


def test_an_expert_without_rows_is_ranked_by_its_weights() -> None:
    torch.manual_seed(0)
    model, x = Routed(), torch.randn(8, 8).abs()
    et.Prune(ratio=0.5).apply(model, Sample.of(x))
    assert [expert[0].out_features for expert in model.experts] == [8, 8]


def test_a_model_that_draws_numbers_is_compared_with_itself() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x + torch.randn(x.shape)).relu())

    model = Noisy()
    by_weight(ratio=0.5).apply(model, Sample.of(torch.randn(4, 8)))
    assert model.up.out_features == 8
