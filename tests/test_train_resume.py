"""Training killed at any moment and resumed: the same bits, or another training is refused."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from edgetune.core.errors import EdgetuneError
from edgetune.train import checkpoint
from edgetune.train.loop import train
from support.trainable import UPDATES, Words, net, quality, same_bits, settings


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
