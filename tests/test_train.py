"""Training: what is learned, weights of accumulation, schedules, and what stops a run; test_train_resume kills it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.core.errors import EdgetuneError
from edgetune.core.ledger import Quality
from edgetune.train import checkpoint
from edgetune.train.loop import count_labels, train
from edgetune.train.plan import TrainingPlan, epoch_order
from edgetune.train.reached import GradientWatch
from edgetune.train.settings import Distill, Train
from support.trainable import Net, Words, net, quality, settings

# -- what is learned ---------------------------------------------------------------------------------------------


def test_it_learns_and_leaves_the_frozen_part_alone() -> None:
    model = net(dropout=0.0)
    base = model.base.weight.clone()
    result = train(model, settings(epochs=15, updates=None), Words(), functional.cross_entropy, seed=0)
    assert quality(model).value > 90
    assert result.losses[-1].loss < result.losses[0].loss / 2
    assert torch.equal(model.base.weight, base)
    assert not model.training
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert result.gradients_mib == sum(p.nbytes for p in trainable) / 2**20
    steps = 4 * len(trainable)  # AdamW counts its updates in one fp32 for each tensor
    assert result.optimizer_state_mib == (2 * sum(p.nbytes for p in trainable) + steps) / 2**20
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "cut", [{"batch_size": 50}, {"batch_size": 7, "accumulate": 8}, {"batch_size": 13, "accumulate": 4}]
)
def test_accumulation_gives_the_gradient_of_all_rows_together(cut: dict[str, int]) -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens).sum(1))

    words, model = Words(lengths=False), Sums()
    expected = Sums()
    functional.cross_entropy(expected(words.tokens), words.labels).backward()
    values = settings(
        optimizer="sgd", momentum=0.0, weight_decay=0.0, learning_rate=1.0, updates=1, clip_norm=None, **cut
    )
    result = train(model, values, words, functional.cross_entropy, seed=0)
    rate = result.losses[0].learning_rate
    for before, after in zip(expected.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(after, before - rate * before.grad, rtol=1e-5, atol=1e-6)


class Text:
    """Texts of different lengths for a causal model; one row has a single token and so nothing to predict."""

    lengths: Sequence[int] | None = (6, 3, 1, 5)

    def __len__(self) -> int:
        return 4

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        tokens = torch.arange(24).reshape(4, 6) % 11
        labels = torch.full_like(tokens, -100)
        for row, length in enumerate(self.lengths or ()):
            labels[row, : length - 1] = tokens[row, 1:length]
        return tokens[list(indices)], labels[list(indices)]


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def test_tokens_weigh_alike_however_texts_are_cut() -> None:
    losses = []
    for batch_size, accumulate in ((4, 1), (2, 2), (1, 4)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))
        teacher = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))
        values = settings(
            updates=3, batch_size=batch_size, accumulate=accumulate, distill=Distill(teacher="train", weight=0.5)
        )
        losses.append([p.loss for p in train(model, values, Text(), next_token, seed=0, teacher=teacher).losses])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    assert count_labels(Text().batch(range(4))[1]) == 5 + 2 + 0 + 4


def test_keep_best_ends_with_the_best_epoch() -> None:
    seen: list[tuple[float, dict[str, Tensor]]] = []

    def validation(model: nn.Module) -> Quality:
        assert not model.training
        torch.rand(3)  # must not move the training's own generator
        loss = [8.0, 5.0, 6.0][len(seen)]
        seen.append((loss, {key: value.clone() for key, value in model.state_dict().items()}))
        return Quality(metric="perplexity", value=loss, rows=1)

    model, plain = net(), net()
    values = settings(keep_best=True, learning_rate=0.01)
    result = train(model, values, Words(), functional.cross_entropy, seed=5, validation=validation)
    assert len(seen) == 3
    assert result.best is not None
    assert result.best.value == 5.0
    assert all(torch.equal(seen[1][1][key], value) for key, value in model.state_dict().items())
    expected = train(plain, settings(learning_rate=0.01), Words(), functional.cross_entropy, seed=5)
    assert result.losses == expected.losses


# -- order and learning rate -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "batch_size"), [(1, 4), (7, 7), (50, 7), (257, 2), (1000, 32)])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_epoch_has_every_row_once_in_another_order(rows: int, batch_size: int, grouped: bool) -> None:
    lengths = [(7 * row) % 13 for row in range(rows)] if grouped else None
    orders = [epoch_order(rows, batch_size, lengths, seed=1, epoch=epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(row for batch in order for row in batch) == list(range(rows))
        sizes = {len(batch) for batch in order}
        assert max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1
        assert len(order) == math.ceil(rows / batch_size)
    assert orders[1] == epoch_order(rows, batch_size, lengths, seed=1, epoch=1)
    if rows > 7:
        assert orders[0] != orders[1]
        assert orders[0] != epoch_order(rows, batch_size, lengths, seed=2, epoch=0)


def test_grouping_by_length_saves_most_padding() -> None:
    lengths = [1 + (31 * row) % 97 for row in range(2000)]

    def padded(order: list[list[int]]) -> int:
        return sum(max(lengths[row] for row in batch) * len(batch) for batch in order)

    assert padded(epoch_order(2000, 32, lengths, 0, 0)) < 1.1 * sum(lengths)
    assert padded(epoch_order(2000, 32, None, 0, 0)) > 1.7 * sum(lengths)


def test_the_rate_warms_up_and_follows_its_schedule() -> None:
    plan = TrainingPlan(Train(updates=100, warmup_pct=10), Words(), seed=0)
    factors = [plan.factor(update) for update in range(100)]
    assert factors[:10] == pytest.approx([n / 11 for n in range(1, 11)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.001
    linear = TrainingPlan(Train(updates=100, warmup_pct=0, schedule="linear"), Words(), seed=0)
    assert [linear.factor(update) for update in (0, 50, 99)] == pytest.approx([1.0, 0.5, 0.01])
    constant = TrainingPlan(Train(updates=5, schedule="constant", warmup_pct=0), Words(), seed=0)
    assert {constant.factor(update) for update in range(5)} == {1.0}


def test_epochs_become_updates() -> None:
    plan = TrainingPlan(Train(epochs=2.5, batch_size=7, accumulate=2), Words(rows=50), seed=0)
    assert (plan.updates_per_epoch, plan.updates) == (4, 10)
    taken = [row for update in range(4, 8) for batch in plan.rows(update) for row in batch]
    assert sorted(taken) == list(range(50))


def test_biases_and_norms_are_not_decayed() -> None:
    model = net(frozen=False, dropout=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    values = settings(updates=1, optimizer="sgd", momentum=0.0, learning_rate=0.5, weight_decay=0.5, warmup_pct=0)
    train(model, values, Words(), lambda logits, labels: 0.0 * logits.sum(), seed=0)
    assert torch.equal(model.base.weight, torch.full_like(model.base.weight, 0.75))
    assert torch.equal(model.base.bias, torch.ones_like(model.base.bias))
    assert torch.equal(model.norm.weight, torch.ones_like(model.norm.weight))


# -- what stops a run --------------------------------------------------------------------------------------------


def broken_after(updates: int, how: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    calls = iter(range(10**6))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        value = functional.cross_entropy(logits, labels)
        return how(value) if next(calls) >= updates else value

    return loss


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda value: value * math.nan, "loss is nan"),
        (lambda value: value / 0.0, "loss is inf"),
        (lambda value: (value - value.detach()).abs().sqrt() + value, "gradient is nan"),
    ],
)
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, how: Callable[[Tensor], Tensor], said: str
) -> None:
    model = net()
    with pytest.raises(EdgetuneError) as caught:
        train(model, settings(accumulate=1), Words(), broken_after(7, how), seed=5, folder=tmp_path)
    message = str(caught.value)
    assert "update 8 at learning rate 0.0" in message
    assert said in message
    assert "update-00000006" in message
    assert "next: lower learning_rate" in message
    assert all(bool(value.isfinite().all()) for value in model.parameters())
    tensors, state = checkpoint.load(tmp_path / "update-00000006")
    assert state["update"] == 6
    assert all(bool(value.isfinite().all()) for value in tensors.values())


def test_what_cannot_be_trained_is_said(tmp_path: Path) -> None:
    frozen = net().requires_grad_(False)
    with pytest.raises(EdgetuneError, match="no parameter of the model is trainable"):
        train(frozen, settings(), Words(), functional.cross_entropy, seed=0)
    with pytest.raises(EdgetuneError, match="no training rows"):
        train(net(), settings(), Words(rows=0, lengths=False), functional.cross_entropy, seed=0)
    with pytest.raises(EdgetuneError, match="needed together"):
        train(net(), settings(), Words(), functional.cross_entropy, seed=0, teacher=net())
    with pytest.raises(EdgetuneError, match="keep_best"):
        train(net(), settings(keep_best=True), Words(), functional.cross_entropy, seed=0)
    with pytest.raises(EdgetuneError, match="folder"):
        train(net(), settings(), Words(), functional.cross_entropy, seed=0, resume=True)


def test_settings_are_either_epochs_or_updates_and_come_back_from_json() -> None:
    assert Train().epochs == 1.0
    assert Train(updates=5).epochs is None
    for values in (Train(), Train(updates=5, distill=Distill(teacher="prune")), Train(optimizer="sgd", momentum=0.5)):
        assert Train.model_validate(values.model_dump()) == values
        assert Train.model_validate_json(values.model_dump_json()) == values
    for wrong in (
        {"epochs": 1, "updates": 5},
        {"epochs": None},
        {"epochs": 0},
        {"momentum": 0.5},
        {"optimizer": "sgd", "betas": (0.5, 0.9)},
        {"betas": (0.9, 1.0)},
        {"learning_rate": math.inf},
        {"batchsize": 3},
    ):
        with pytest.raises(EdgetuneError):
            Train(**wrong)  # type: ignore[arg-type]


# -- what no backward reaches ------------------------------------------------------------------------------------


class WithUnused(Net):
    """`spare` is never called; `expert` only for rows that some batches do not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(8, 8)
        self.expert = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        rare = tokens[:, 0] == 15  # one row of 18
        return logits.masked_scatter(rare[:, None], self.expert(logits[rare])) if rare.any() else logits


@pytest.mark.parametrize("in_backward", [False, True])
def test_what_no_backward_reaches_is_named(in_backward: bool) -> None:
    torch.manual_seed(3)
    model = WithUnused()
    changes = {"in_backward": True, "clip_norm": None} if in_backward else {}
    asked = settings(accumulate=1, batch_size=4, updates=60, **changes)
    done: list[int] = []
    with pytest.raises(EdgetuneError, match=r"spare\.weight, spare\.bias: trainable, but no backward .* in 10 steps"):
        train(model, asked, Words(200), functional.cross_entropy, seed=1, progress=lambda n, *_: done.append(n))
    assert done == list(range(1, 10))
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    model.spare.requires_grad_(False)
    train(model, asked, Words(200), functional.cross_entropy, seed=1)


def test_a_short_training_is_judged_where_its_first_epoch_ends() -> None:
    torch.manual_seed(3)
    model = Net()
    model.spare = nn.Parameter(torch.zeros(2))
    with pytest.raises(EdgetuneError, match="spare: trainable, but no backward has reached it in 4 steps"):
        train(model, settings(), Words(50), functional.cross_entropy, seed=1)


def test_a_trainer_whose_gradients_are_elsewhere_is_not_judged() -> None:
    with GradientWatch(Net()) as reached:
        for _ in range(20):
            reached.step(last=True)
