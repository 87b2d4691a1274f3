"""The log of a training: JSON lines always, loggers where they are asked for; a resumed training goes on with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from edgetune.core.errors import EdgetuneError
from edgetune.train import loggers
from edgetune.train.loggers import LoggerName, TrainingLog, read


def log_of(folder: Path, *names: LoggerName) -> TrainingLog:
    return TrainingLog(folder / "01-train", "run-01-train", names, {"epochs": 1.0, "betas": [0.9, 0.999]})


def add(log: TrainingLog, *updates: int) -> None:
    for update in updates:
        log.add(update, 5, 1 / update, 0.01 * update)


def test_a_resumed_training_goes_on_with_the_lines_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "01-train" / loggers.FILE
    with log_of(tmp_path):
        assert not path.exists(), "nothing was done yet"
    with log_of(tmp_path) as log:
        add(log, 1, 2, 3)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"update": 4, "upd')  # a kill
    before = read(path)
    assert [line["update"] for line in before] == [1, 2, 3]
    with log_of(tmp_path) as log:
        add(log, 3, 4)
    lines = read(path)
    assert lines[:2] == before[:2]
    assert [(line["update"], line["updates"], line["loss"]) for line in lines[2:]] == [(3, 5, 1 / 3), (4, 5, 1 / 4)]
    assert [line["learning_rate"] for line in lines] == [0.01, 0.02, 0.03, 0.04]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    with log_of(tmp_path):
        pass
    assert read(path) == lines, "a training that is done leaves its log as it is"


def test_tensorboard_has_each_update_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for updates in ((1, 2, 3), (3, 4)):
        with log_of(tmp_path, "tensorboard") as log:
            add(log, *updates)
    events = accumulator.EventAccumulator(str(tmp_path / "01-train" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (n, pytest.approx(1 / n)) for n in (1, 2, 3, 4)
    ]
    assert {"train/learning_rate", "train/seconds"} <= set(events.Tags()["scalars"])


def test_a_logger_that_fails_costs_no_training(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = tmp_path / "01-train"
    folder.mkdir()
    (folder / "tensorboard").write_text("a file where the folder should be", encoding="utf-8")
    with log_of(tmp_path, "tensorboard") as log, pytest.warns(UserWarning, match="tensorboard stopped logging"):
        add(log, 1, 2)
    assert [line["update"] for line in read(folder / loggers.FILE)] == [1, 2]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_each_update(name: LoggerName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip(name)
    loggers.check([name])
    with log_of(tmp_path, name) as log:
        add(log, 51, 52)
        assert name in log.loggers
    kept = {"wandb": tmp_path / "01-train" / "wandb", "trackio": tmp_path / "trackio"}[name]
    assert list(kept.rglob("*.wandb" if name == "wandb" else "edgetune.db"))


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_what_is_missing_is_said_with_the_line_that_installs_it(name: LoggerName) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(EdgetuneError, match=f"train.log names {name}") as caught:
        loggers.check([name])
    assert caught.value.action == f"pip install {name}"
