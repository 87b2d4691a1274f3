"""Training: exact resume after a kill, weights of accumulation, schedules, and what stops a run."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.core.errors import EdgetuneError
from edgetune.core.ledger import Quality
from edgetune.train import checkpoint
from edgetune.train.loop import count_labels, soft_loss, train
from edgetune.train.plan import TrainingPlan, epoch_order
from edgetune.train.reached import GradientWatch
from edgetune.train.settings import Distill, Train

UPDATES = 12


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from more, and wait for one another on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """Embedding, a frozen layer with a low-rank side path, batch norm (buffers) and dropout (random numbers)."""

    def __init__(self, frozen: bool = True, dropout: float = 0.3) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.base = nn.Linear(8, 8)
        self.down = nn.Parameter(torch.randn(2, 8))
        self.up = nn.Parameter(torch.zeros(8, 2))
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)
        self.base.requires_grad_(not frozen)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).mean(1)
        x = self.base(x) + x @ self.down.T @ self.up.T
        return self.head(self.dropout(torch.relu(self.norm(x))))


class Words:
    """Rows of tokens whose class is each token modulo three; `lengths` for batches of like length."""

    def __init__(self, rows: int = 50, lengths: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.randint(3, (rows,), generator=generator)
        self.tokens = 3 * torch.randint(6, (rows, 6), generator=generator) + self.labels[:, None]
        self.lengths: Sequence[int] | None = [1 + i % 6 for i in range(rows)] if lengths else None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(list(indices))
        width = max(self.lengths[i] for i in indices) if self.lengths else 6
        return self.tokens[rows, :width], self.labels[rows]


def net(**settings: Any) -> Net:
    torch.manual_seed(3)
    return Net(**settings)


def quality(model: nn.Module) -> Quality:
    words = Words()
    with torch.no_grad():
        hits = model(words.tokens).argmax(1).eq(words.labels).float().mean()
    return Quality(metric="accuracy_pct", value=100 * float(hits), rows=len(words))


def settings(**changes: Any) -> Train:
    values = {"updates": UPDATES, "batch_size": 7, "accumulate": 2, "learning_rate": 0.02, "checkpoint_every": 3}
    return Train(**{**values, **changes})


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[key].flatten().view(torch.uint8), theirs[key].flatten().view(torch.uint8)) for key in ours
    )


# -- killed and resumed ------------------------------------------------------------------------------------------


def killable(pipe: Connection, folder: str, target: str, optimizer: str) -> None:
    """In a child: train, and before each change on disk and after each update ask the parent whether to go on."""
    torch.set_num_threads(1)

    def ask(what: str) -> None:
        pipe.send(what)
        pipe.recv()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"} and str(arguments[0]).startswith(
            folder + os.sep
        ):
            ask(f"{event} {Path(str(arguments[0])).name}")

    sys.addaudithook(hook)
    model = net()
    result = train(
        model,
        settings(optimizer=optimizer, keep_best=True),
        Words(),
        functional.cross_entropy,
        seed=5,
        folder=Path(folder),
        resume=True,
        validation=quality,
        progress=lambda update, *_: ask(f"update {update}"),
    )
    losses = torch.tensor([point.loss for point in result.losses], dtype=torch.float64)
    checkpoint.save(Path(target), {**model.state_dict(), "losses": losses}, {})
    pipe.send("done")


@pytest.fixture(scope="module")
def server() -> Any:
    """Children start from a process that has torch loaded and has never run it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["edgetune.train.loop", "torch._dynamo", "pytest"]
    )  # building an optimizer loads dynamo
    return context


def attempt(server: Any, arguments: tuple[str, str, str], stop_at: int | None) -> list[str]:
    """Run a child and SIGKILL it when it asks for the `stop_at`-th time; what it said, "done" last if it finished."""
    ours, theirs = server.Pipe()
    child = server.Process(target=killable, args=(theirs, *arguments))
    child.start()
    theirs.close()
    heard: list[str] = []
    try:
        while True:
            heard.append(ours.recv())
            if heard[-1] == "done":
                child.join()
                assert child.exitcode == 0
                return heard
            if len(heard) - 1 == stop_at:
                os.kill(child.pid, signal.SIGKILL)
                child.join()
                assert child.exitcode == -signal.SIGKILL
                return heard
            ours.send("go on")
    finally:
        ours.close()
        if child.is_alive():
            child.kill()
        child.join()


def finished(tmp_path: Path) -> dict[str, Tensor]:
    return checkpoint.load(tmp_path)[0]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].reshape(-1), b[k].reshape(-1)) for k in a)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_killed_again_and_again_and_resumed_ends_with_the_same_bits(
    server: Any, tmp_path: Path, optimizer: str
) -> None:
    whole = attempt(server, (str(tmp_path / "whole"), str(tmp_path / "expected"), optimizer), None)
    expected = finished(tmp_path / "expected")
    assert sum(event.startswith("update") for event in whole) == UPDATES
    assert not equal(expected, {**net().state_dict(), "losses": expected["losses"]})  # it did learn something
    dice = random.Random(optimizer)
    for chain in range(3):
        arguments = (str(tmp_path / f"run{chain}"), str(tmp_path / f"end{chain}"), optimizer)
        died = []
        while (heard := attempt(server, arguments, dice.randrange(len(whole) // 2)))[-1] != "done":
            died.append(heard[-1])
        assert died
        assert equal(finished(tmp_path / f"end{chain}"), expected), died


def test_killed_at_every_step_of_writing_a_checkpoint(server: Any, tmp_path: Path) -> None:
    arguments = (str(tmp_path / "whole"), str(tmp_path / "expected"), "adamw")
    whole = attempt(server, arguments, None)
    expected = finished(tmp_path / "expected")
    second = max(index for index, event in enumerate(whole) if event.startswith("os.mkdir"))
    moments = range(second, len(whole) - 1)  # the last checkpoint, while two complete ones lie there
    assert len(moments) > 8
    for moment in moments:
        arguments = (str(tmp_path / f"run{moment}"), str(tmp_path / f"end{moment}"), "adamw")
        heard = attempt(server, arguments, moment)
        assert [event.split()[0] for event in heard] == [event.split()[0] for event in whole[: moment + 1]]
        assert checkpoint.latest(tmp_path / f"run{moment}") is not None, heard[-1]
        again = attempt(server, arguments, None)
        assert len(again) < len(whole)
        assert equal(finished(tmp_path / f"end{moment}"), expected), heard[-1]


def test_ctrl_c_finishes_the_update_writes_a_checkpoint_and_is_raised(tmp_path: Path) -> None:
    whole, stopped = net(), net()
    expected = train(whole, settings(), Words(), functional.cross_entropy, seed=5)

    def press(update: int, *_: float) -> None:
        if update == 5:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, settings(), Words(), functional.cross_entropy, seed=5, folder=tmp_path, progress=press)
    assert signal.getsignal(signal.SIGINT) is before
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.name == "update-00000005"
    fresh = net()
    result = train(fresh, settings(), Words(), functional.cross_entropy, seed=5, folder=tmp_path, resume=True)
    assert result.resumed_from == 5
    assert result.losses == expected.losses
    assert same_bits(fresh, whole)


def test_a_finished_training_is_taken_from_its_checkpoint(tmp_path: Path) -> None:
    first, second = net(), net()
    options: dict[str, Any] = {"seed": 5, "folder": tmp_path}
    expected = train(first, settings(), Words(), functional.cross_entropy, **options)
    result = train(second, settings(), Words(), functional.cross_entropy, resume=True, **options)
    assert result.resumed_from == UPDATES
    assert (result.losses, result.gradients_mib) == (expected.losses, expected.gradients_mib)
    assert result.optimizer_state_mib == expected.optimizer_state_mib
    assert same_bits(first, second)
    with pytest.raises(EdgetuneError, match="earlier training"):
        train(net(), settings(), Words(), functional.cross_entropy, **options)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, caplog: Any) -> None:
    whole, again = net(), net()
    train(whole, settings(), Words(), functional.cross_entropy, seed=5, folder=tmp_path)
    file = next((tmp_path / f"update-{UPDATES:08d}").glob("tensors-*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    result = train(again, settings(), Words(), functional.cross_entropy, seed=5, folder=tmp_path, resume=True)
    assert result.resumed_from == 9
    assert same_bits(whole, again)
    assert "checksum" in caplog.text


@pytest.mark.parametrize("what", ["seed", "settings", "rows", "frozen", "trained", "threads"])
def test_another_training_is_not_resumed(tmp_path: Path, what: str) -> None:
    whole = settings(updates=3, checkpoint_every=2)
    train(net(), whole, Words(), functional.cross_entropy, seed=5, folder=tmp_path)
    shutil.rmtree(tmp_path / "update-00000003")  # so that one update is left
    model, values, words, seed, threads = net(), whole, Words(), 5, torch.get_num_threads()
    if what == "seed":
        seed = 6
    elif what == "settings":
        values = whole.model_copy(update={"learning_rate": 0.01})
    elif what == "rows":
        words = Words(rows=49)
    elif what == "frozen":
        model.base.weight.data[0, 0] += 1
    elif what == "trained":
        model.base.requires_grad_(True)
    try:
        if what == "threads":
            torch.set_num_threads(threads + 1)
        with pytest.raises(EdgetuneError, match=f"{what} was"):
            train(model, values, words, functional.cross_entropy, seed=seed, folder=tmp_path, resume=True)
    finally:
        torch.set_num_threads(threads)


def test_a_finished_training_is_restored_with_other_threads(tmp_path: Path) -> None:
    first, second, threads = net(), net(), torch.get_num_threads()
    train(first, settings(updates=3), Words(), functional.cross_entropy, seed=5, folder=tmp_path)
    try:
        torch.set_num_threads(threads + 1)
        train(second, settings(updates=3), Words(), functional.cross_entropy, seed=5, folder=tmp_path, resume=True)
    finally:
        torch.set_num_threads(threads)
    assert same_bits(first, second)


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


def test_soft_loss_is_the_divergence_times_the_squared_temperature() -> None:
    torch.manual_seed(0)
    logits, target, labels = torch.randn(5, 3), torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)
    p, q = (target / 3).softmax(1), (logits / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(soft_loss(logits, target, labels, 3.0), expected)
    assert soft_loss(target, target, labels, 2.0) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(EdgetuneError, match="teacher"):
        soft_loss(logits, torch.randn(5, 4), labels, 2.0)


def test_distillation_pulls_towards_the_teacher_and_leaves_it_alone() -> None:
    torch.manual_seed(9)
    teacher = Net().train()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    words = Words()

    def distance(model: nn.Module) -> float:
        with torch.no_grad():
            return float(soft_loss(model(words.tokens), teacher(words.tokens), words.labels, 1.0))

    values = settings(updates=60, distill=Distill(teacher="prune", weight=1.0))
    student, plain = net(dropout=0.0), net(dropout=0.0)
    train(student, values, words, functional.cross_entropy, seed=0, teacher=teacher)
    assert not teacher.training
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    train(plain, settings(updates=60), words, functional.cross_entropy, seed=0)
    assert distance(student) < distance(plain) / 2


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
