"""Batches of a split, the quality of a model on it, and the baselines beside it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from edgetune.core.errors import EdgetuneError
from edgetune.data.dataset import Split
from edgetune.data.rows import Rows
from edgetune.data.tables import from_csv
from edgetune.tasks.causal_lm import CausalLM
from edgetune.tasks.quality import distributions_on, logits_for, quality, shift_between
from edgetune.tasks.regression import Regression
from edgetune.tasks.text_classification import TextClassification
from support.datasets import data_settings, save_table


def encode_words(inputs: object, pad_to: int | None = None) -> dict[str, torch.Tensor]:
    """Each word as its length."""
    rows = [[len(word) for word in text.split()] for text in inputs]  # type: ignore[attr-defined]
    width = pad_to or max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


class Words(nn.Module):
    """Sees the number of words; the second class where there are more than two."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.9)
        self.seen: list[int] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        assert not self.training
        self.seen.append(input_ids.shape[1])
        torch.rand(1)
        score = self.dropout(attention_mask.sum(1).float() - 2.5)
        return torch.stack([-score, score], dim=1)


def test_batches_hold_labels_in_order() -> None:
    split = Split(TextClassification(("no", "yes")), Rows(["a", "a b c", "a b"], [0, 1, 0]), encode_words)
    inputs, labels = split.batch([2, 1])
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 1]
    assert inputs["attention_mask"].sum(1).tolist() == [2, 3]  # type: ignore[call-overload, index]
    assert [len(labels) for _, labels in split.batches(2)] == [2, 1]
    assert split.lengths == (1, 3, 2)


def test_language_model_batches_ignore_padding() -> None:
    split = Split(CausalLM(), Rows(["aaa b", "a b c"]), encode_words)
    _, labels = split.batch([0, 1])
    assert labels.tolist() == [[1, -100, -100], [1, 1, -100]]


def test_quality_and_predictions_come_in_order_and_leave_no_trace() -> None:
    texts = ["a " * n for n in (5, 1, 3, 2, 9, 1)]
    split = Split(TextClassification(("no", "yes")), Rows(texts, [1, 0, 1, 1, 1, 0]), encode_words)
    model = Words().train()
    model.dropout.eval()
    before = torch.get_rng_state()
    found = quality(model, split, batch_size=2)
    assert (found.metric, found.rows) == ("accuracy_pct", 6)
    assert found.value == pytest.approx(100 * 5 / 6)
    assert logits_for(model, split, batch_size=4).argmax(1).tolist() == [1, 0, 1, 0, 1, 0]
    assert torch.equal(before, torch.get_rng_state())
    assert (model.training, model.dropout.training) == (True, False)
    assert model.seen[:3] == [1, 3, 9]  # rows of like length together


def test_outputs_that_are_not_finite_raise() -> None:
    class Broken(nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return torch.full((len(input_ids), 2), float("nan"))

    split = Split(TextClassification(("no", "yes")), Rows(["a"], [0]), encode_words)
    with pytest.raises(EdgetuneError, match="not finite"):
        quality(Broken(), split)


def test_perplexity_is_over_all_tokens() -> None:
    class Uniform(nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*input_ids.shape, 7)

    split = Split(CausalLM(), Rows(["a b c", "a b", "a b c d e"]), encode_words)
    found = quality(Uniform(), split, batch_size=2)
    assert found.metric == "perplexity"
    assert found.value == pytest.approx(7.0)


def test_loss_shifts_for_language_models() -> None:
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    tokens, mask = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0]]), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    _, labels = CausalLM().collate({"input_ids": tokens, "attention_mask": mask}, None)
    picked = torch.stack([logits.log_softmax(-1)[b, t, tokens[b, t + 1]] for b, t in ((0, 0), (0, 1), (1, 0))])
    assert CausalLM().loss(logits, labels).item() == pytest.approx(-picked.mean().item())
    plain = TextClassification().loss(logits[:, 0], torch.tensor([1, 4]))
    assert plain.item() == pytest.approx(nn.functional.cross_entropy(logits[:, 0], torch.tensor([1, 4])).item())


def test_baselines_of_texts_and_of_language_models(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    found = from_csv(str(save_table(tmp_path / "a.csv")), data_settings())
    simple, learned = found.task.baselines(found.parts)
    assert 30 < simple.value < 70
    assert simple.name in ("always good", "always bad")
    assert learned.value == 100
    chat = from_csv(str(save_table(tmp_path / "a.csv")), data_settings(label=None))
    assert chat.task.baselines(chat.parts) == ()
    (unigram,) = chat.task.baselines(chat.parts, encode_words)
    assert 1 < unigram.value < 12


def test_shift_between_two_models() -> None:
    """Two of four predictions change; of the divergence every row has its own by hand."""
    before = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]])
    after = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.8, 0.2], [0.5, 0.5]])
    shift = shift_between(before.log(), after.log())
    by_hand = (0.2 * math.log(0.6 / 0.4) + 0.6 * math.log(0.8 / 0.2)) / 4
    assert shift.kl_divergence == pytest.approx(by_hand)
    assert (shift.changed_pct, shift.predictions) == (50.0, 4)


def test_distributions_of_tokens_leave_out_padding_and_of_a_regression_there_are_none() -> None:
    class Tokens(nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot(input_ids, 5).float()

    split = Split(CausalLM(), Rows(["aaa b", "a b c d"]), encode_words)
    distributions = distributions_on(Tokens(), split)
    assert distributions is not None
    assert distributions.shape == (4, 5)  # one token less than each text has
    assert distributions.argmax(-1).tolist() == [3, 1, 1, 1]
    assert distributions.exp().sum(-1) == pytest.approx(torch.ones(4))
    values = Split(Regression(), Rows(["a", "a b"], [0.5, 1.5]), encode_words)
    assert distributions_on(Words(), values) is None
