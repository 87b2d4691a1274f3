"""Training: exact resume after a kill, weights of accumulation, schedules, and what stops a run."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from edgetune import checkpoint
from edgetune.ledger import Quality
from edgetune.plan import Plan, epoch_order
from edgetune.technique import EdgetuneError
from edgetune.train import Distill, Train, TrainResult, counted, soft_loss, train

UPDATES = 12


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
    """Rows of tokens whose class is the first token modulo three; `lengths` for batches of like length."""

    def __init__(self, rows: int = 50, lengths: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(20, (rows, 6), generator=generator)
        self.labels = self.tokens[:, 0] % 3
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
    values = {"updates": UPDATES, "batch_size": 7, "accumulate": 2, "learning_rate": 0.02, "checkpoint_every": 4}
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
        if event in {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"} and folder in str(arguments[0]):
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
    context.set_forkserver_preload(["edgetune.train"])
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
    second = [index for index, event in enumerate(whole) if event.startswith("mkdir") or event.startswith("os.mkdir")][
        -1
    ]
    moments = range(second, len(whole) - 1)  # the last checkpoint, while two complete ones lie there
    assert len(moments) > 8
    for moment in moments:
        arguments = (str(tmp_path / f"run{moment}"), str(tmp_path / f"end{moment}"), "adamw")
        heard = attempt(server, arguments, moment)
        assert heard[-1] == whole[moment]
        assert checkpoint.latest(tmp_path / f"run{moment}") is not None, heard[-1]
        again = attempt(server, arguments, None)
        assert len(again) < len(whole)
        assert equal(finished(tmp_path / f"end{moment}"), expected), heard[-1]
