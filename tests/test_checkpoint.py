"""Checkpoints: what is stored comes back exactly, and what is damaged or unfinished is never taken for one."""

from __future__ import annotations

import json
import math
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.files import build_folder, replace_files
from edgetune.train import checkpoint

FILES = 3


def odd_tensors() -> dict[str, Tensor]:
    """Everything that a naive safetensors call refuses or changes."""
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "whole": base,
        "same again": base,
        "part": base[1:, 2:],
        "strided": base.t(),
        "expanded": torch.ones(1).expand(5),
        "zero-dim": torch.tensor(7.0),
        "empty": torch.empty(0, 3),
        "bf16": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
        "half": torch.tensor([0.1], dtype=torch.float16),
        "bytes": torch.get_rng_state(),
        "long": torch.tensor([2**62]),
        "bool": torch.tensor([True, False]),
        "not finite": torch.tensor([math.nan, math.inf, -0.0]),
        "needs grad": nn.Parameter(torch.randn(2, 2)),
    }


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist())


def assert_same(a: Tensor, b: Tensor) -> None:
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert bits(a) == bits(b)


def test_tensors_and_state_come_back_exactly(tmp_path: Path) -> None:
    state = {"update": 3, "loss": 0.1 + 0.2, "names": ["a", None, True], "large": 2**70}
    expected = odd_tensors()
    checkpoint.save(tmp_path / "a", expected, state)
    tensors, found = checkpoint.load(tmp_path / "a")
    assert found == state
    assert tensors.keys() == expected.keys()
    for name in expected:
        assert_same(tensors[name], expected[name])
    assert len(list((tmp_path / "a").iterdir())) == FILES
    tensors["whole"].add_(1)  # loaded tensors are one's own
    assert_same(checkpoint.load(tmp_path / "a")[0]["whole"], expected["whole"])


def test_no_pickle(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", odd_tensors(), {"x": 1})
    assert sorted(entry.suffix for entry in (tmp_path / "a").iterdir()) == [".json", ".json", ".safetensors"]


def test_a_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", {"x": torch.zeros(3)}, {"n": 1})
    checkpoint.save(tmp_path / "a", {"x": torch.ones(3)}, {"n": 2})
    tensors, state = checkpoint.load(tmp_path / "a")
    assert (tensors["x"].tolist(), state) == ([1.0, 1.0, 1.0], {"n": 2})
    assert len(list((tmp_path / "a").iterdir())) == FILES


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The system refuses longer files, as it refuses to write on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_keeps_the_checkpoint_before_it_and_leaves_nothing(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", {"x": torch.zeros(3)}, {"n": 1})
    large = {"x": torch.zeros(100_000)}
    for folder in ("a", "b"):
        with files_no_larger_than(50_000), pytest.raises(EdgetuneError, match="could not be written") as caught:
            checkpoint.save(tmp_path / folder, large, {"n": 2})
        assert "disk space" in str(caught.value)
    assert checkpoint.load(tmp_path / "a")[1] == {"n": 1}
    assert len(list((tmp_path / "a").iterdir())) == FILES
    assert not (tmp_path / "b").exists()
    with files_no_larger_than(2_000), pytest.raises(EdgetuneError, match="could not be written"):
        checkpoint.save(tmp_path / "a", {"x": torch.ones(3)}, {"n": list(range(2_000))})
    assert checkpoint.load(tmp_path / "a")[0]["x"].tolist() == [0.0, 0.0, 0.0]


def test_files_that_belong_together_are_replaced_together_or_not_at_all(tmp_path: Path) -> None:
    paths = tmp_path / "new" / "model.ptd", tmp_path / "new" / "model.pte"
    with replace_files(*paths) as temporary:
        assert [path.suffix for path in temporary] == [".ptd", ".pte"]
        assert temporary[0].stem == temporary[1].stem
        for path in temporary:
            path.write_text("first", encoding="utf-8")
        assert not any(path.exists() for path in paths)
    assert [path.read_text(encoding="utf-8") for path in paths] == ["first", "first"]
    with pytest.raises(ZeroDivisionError), replace_files(*paths) as temporary:  # noqa: PT012  the file is half written
        temporary[0].write_text("second", encoding="utf-8")
        1 / 0  # noqa: B018
    assert [path.read_text(encoding="utf-8") for path in paths] == ["first", "first"]
    assert sorted((tmp_path / "new").iterdir()) == sorted(paths)


def test_a_new_folder_is_there_once_it_is_filled(tmp_path: Path) -> None:
    with build_folder(tmp_path / "a" / "b") as unfinished:
        (unfinished / "inner").mkdir()
        (unfinished / "inner" / "file").write_text("x", encoding="utf-8")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "inner" / "file").read_text(encoding="utf-8") == "x"
    with pytest.raises(KeyboardInterrupt), build_folder(tmp_path / "a" / "c"):
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_state_that_is_no_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for state in ({"x": math.nan}, {"x": object()}):
        with pytest.raises(EdgetuneError, match="JSON"):
            checkpoint.save(tmp_path / "a", {}, state)
    assert not (tmp_path / "a").exists()


def change(folder: Path, how: str) -> None:
    tensors = next(folder.glob("tensors-*"))
    marker = folder / checkpoint.MARKER
    if how == "no marker":
        marker.unlink()
    elif how == "half a marker":
        marker.write_text(marker.read_text()[:40])
    elif how == "another format":
        marker.write_text(json.dumps({**json.loads(marker.read_text()), "format": 99}))
    elif how == "cut short":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif how == "one bit":
        content = tensors.read_bytes()
        tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "missing":
        next(folder.glob("state-*")).unlink()
    elif how == "outside":
        marker.write_text(marker.read_text().replace(tensors.name, f"../{tensors.name}"))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no marker", "never finished"),
        ("half a marker", "cannot be read"),
        ("another format", "format is 99"),
        ("cut short", "bytes instead of"),
        ("one bit", "checksum"),
        ("missing", "missing"),
        ("outside", "missing"),
    ],
)
def test_what_is_damaged_is_refused_and_passed_over(tmp_path: Path, caplog: Any, how: str, said: str) -> None:
    checkpoint.save(tmp_path / "update-1", {"x": torch.zeros(3)}, {"n": 1})
    checkpoint.save(tmp_path / "update-2", {"x": torch.ones(3)}, {"n": 2})
    assert checkpoint.latest(tmp_path) == tmp_path / "update-2"
    change(tmp_path / "update-2", how)
    with pytest.raises(EdgetuneError, match=said):
        checkpoint.load(tmp_path / "update-2")
    assert checkpoint.latest(tmp_path) == tmp_path / "update-1"
    assert "is skipped" in caplog.text
    assert said in caplog.text


def test_tidy_removes_the_old_and_the_unfinished_and_nothing_else(tmp_path: Path) -> None:
    for number in range(1, 5):
        checkpoint.save(tmp_path / f"update-{number}", {"x": torch.zeros(3)}, {})
    (tmp_path / "update-5").mkdir()
    (tmp_path / "update-5" / ".tensors.safetensors").write_bytes(b"half of i")
    (tmp_path / "update-6").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    (tmp_path / "state.txt").write_text("keep")
    checkpoint.remove_old(tmp_path, keep=2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mine", "state.txt", "update-3", "update-4"]
    checkpoint.remove_old(tmp_path / "nowhere")
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "state-notes.json").write_text("mine")
    checkpoint.save(tmp_path, {"x": torch.zeros(3)}, {"n": 1})
    checkpoint.save(tmp_path, {"x": torch.ones(3)}, {"n": 2})
    assert (tmp_path / "state-notes.json").read_text() == "mine"
    assert checkpoint.load(tmp_path)[1] == {"n": 2}


@pytest.mark.parametrize("kind", ["adamw", "amsgrad", "sgd", "momentum", "nothing yet"])
def test_an_optimizer_comes_back_exactly(tmp_path: Path, kind: str) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        groups = [{"params": model[0].parameters(), "weight_decay": 0.0}, {"params": model[1].parameters()}]
        if kind in {"sgd", "momentum"}:
            return model, torch.optim.SGD(groups, lr=0.1, momentum=0.9 if kind == "momentum" else 0)
        return model, torch.optim.AdamW(groups, lr=0.1, amsgrad=kind == "amsgrad")

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        torch.manual_seed(number)
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    for number in range(0 if kind == "nothing yet" else 3):
        step(model, optimizer, number)
    tensors, tree = checkpoint.pack(optimizer.state_dict(), "optimizer/")
    weights = {f"w/{name}": value for name, value in model.named_parameters()}
    checkpoint.save(tmp_path, {**tensors, **weights}, {"optimizer": tree})
    found, state = checkpoint.load(tmp_path)
    again, other = make()
    again.load_state_dict({name: found[f"w/{name}"] for name in again.state_dict()})
    other.load_state_dict(checkpoint.unpack(found, state["optimizer"]))
    assert str(other.state_dict()) == str(optimizer.state_dict())
    assert type(other.state_dict()["param_groups"][0].get("betas", ())) is tuple
    for number in range(3, 6):
        step(model, optimizer, number)
        step(again, other, number)
    for name, value in model.state_dict().items():
        assert_same(again.state_dict()[name], value)


def test_pack_keeps_the_form_of_a_tree(tmp_path: Path) -> None:
    value = {
        0: (1, [2.5, None]),
        "0": {"inf": math.inf, "deep": ({},)},
        1: torch.ones(2),
        "1": torch.zeros(2),
    }
    tensors, tree = checkpoint.pack(value)
    checkpoint.save(tmp_path, tensors, {"tree": tree})
    found, state = checkpoint.load(tmp_path)
    again = checkpoint.unpack(found, state["tree"])
    assert list(again) == list(value)
    assert again[0] == value[0]
    assert again["0"] == value["0"]
    assert_same(again["1"], torch.zeros(2))
    assert math.isnan(checkpoint.unpack({}, checkpoint.pack(math.nan)[1]))
    with pytest.raises(EdgetuneError, match="cannot be stored"):
        checkpoint.pack({"x": {1, 2}})


def test_random_states_come_back(tmp_path: Path) -> None:
    def draw() -> list[object]:
        return [torch.rand(3).tolist(), torch.randn(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1)]

    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    draw()  # an odd number of normal draws, so that a spare one is kept
    tensors, tree = checkpoint.pack(checkpoint.random_state(), "random/")
    checkpoint.save(tmp_path, tensors, {"random": tree})
    expected = [draw(), draw()]
    found, state = checkpoint.load(tmp_path)
    checkpoint.set_random_state(checkpoint.unpack(found, state["random"]))
    assert [draw(), draw()] == expected
