"""Log a training while it runs: always as JSON lines, and to the loggers that `train.log` names."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

from edgetune.core.errors import EdgetuneError
from edgetune.core.files import write_atomically
from edgetune.core.quiet import silence_libraries

LoggerName = Literal["tensorboard", "wandb", "trackio"]
FILE = "log.jsonl"
PROJECT = "edgetune"  # under which wandb and trackio list the runs


class Logger(Protocol):
    """A logger in addition to the JSON lines."""

    def add(self, update: int, figures: Mapping[str, float]) -> None:
        """The figures of one update."""

    def close(self) -> None:
        """Write what is left."""


class _TensorBoard:
    """Event files in `tensorboard/` next to the checkpoints; `tensorboard --logdir runs` shows them."""

    def __init__(self, folder: Path, update: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # a resumed training does some updates again: what was written of them goes
        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=update)  # type: ignore[no-untyped-call]

    def add(self, update: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(f"train/{name}", value, update)

    def close(self) -> None:
        self.writer.close()


class _Service:
    """wandb or trackio, which have the same interface. Each part of a resumed training is a separate run there."""

    def __init__(self, module: str, run: str, config: Mapping[str, Any], **more: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it would tear the progress bars
            self.service = importlib.import_module(module)
            self.run = self.service.init(project=PROJECT, name=run, config=dict(config), **more)

    def add(self, update: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=update)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.service.finish()


def check(names: Iterable[LoggerName]) -> None:
    """Raise if a logger is not installed or cannot start, before any work is done."""
    for name in names:
        try:
            with silence_libraries():
                module = importlib.import_module(name)
        except ImportError as error:
            message = f"train.log names {name}, which could not be imported ({error})"
            raise EdgetuneError(message, action=f"pip install {name}") from error
        if name == "wandb" and os.environ.get("WANDB_MODE", "online") == "online" and not module.login(prompt=False):
            message, action = "train.log names wandb, which is not logged in", "wandb login, or set WANDB_MODE=offline"
            raise EdgetuneError(message, action=action)


class TrainingLog:
    """The log of one training: `log.jsonl` in `folder`, and the loggers.

    A line has update, updates (in total), loss, learning_rate and seconds (since the training began, over all its
    parts).
    Nothing is opened before the first update, so a training that is already finished leaves its log unchanged.
    """

    def __init__(self, folder: Path, run: str, names: Iterable[LoggerName], settings: Mapping[str, Any]) -> None:
        self.folder, self.run, self.names, self.settings = folder, run, tuple(names), settings
        self.began = time.perf_counter()
        self.file: TextIO | None = None
        self.loggers: dict[str, Logger] = {}

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()
        for name in tuple(self.loggers):
            with self._drop_if_failing(name):
                self.loggers[name].close()

    def add(self, update: int, updates: int, loss: float, learning_rate: float) -> None:
        """Log one update."""
        file = self._open(update)
        seconds = round(time.perf_counter() - self.began, 3)
        figures = {"loss": loss, "learning_rate": learning_rate, "seconds": seconds}
        file.write(json.dumps({"update": update, "updates": updates, **figures}) + "\n")
        file.flush()
        for name in tuple(self.loggers):
            with self._drop_if_failing(name):
                self.loggers[name].add(update, figures)

    def _open(self, update: int) -> TextIO:
        """The file, which keeps the lines of an earlier part before this update."""
        if self.file is None:
            path = self.folder / FILE
            earlier = [line for line in read(path) if line["update"] < update]
            self.began -= earlier[-1]["seconds"] if earlier else 0.0
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in earlier))
            self.file = path.open("a", encoding="utf-8")
            for name in self.names:
                with self._drop_if_failing(name):
                    self.loggers[name] = self._start(name, update)
        return self.file

    def _start(self, name: LoggerName, update: int) -> Logger:
        if name == "tensorboard":
            return _TensorBoard(self.folder, update)
        if name == "trackio":
            return _Service(name, self.run, self.settings)
        wandb = importlib.import_module(name)
        return _Service(
            name, self.run, self.settings, dir=self.folder, settings=wandb.Settings(silent=True, console="off")
        )

    @contextlib.contextmanager
    def _drop_if_failing(self, name: str) -> Any:
        """Drop a logger that fails, with a warning: it must not stop a training."""
        try:
            yield
        except Exception as error:
            self.loggers.pop(name, None)
            warnings.warn(f"{name} stopped logging ({error}); {self.folder / FILE} has all updates", stacklevel=2)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl`; [] if there is no file. A last line truncated by a kill is left out."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]
