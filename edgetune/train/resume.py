"""Save and restore a training bit-identically, and handle Ctrl-C between two updates."""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import device_of
from edgetune.core.ledger import LossPoint, Quality
from edgetune.train import checkpoint, optimizer

if TYPE_CHECKING:
    from edgetune.train.settings import Train

CHANGES_NO_RESULT = ("checkpoint_every", "cache_max_mib", "log")  # settings of a training


@dataclass
class Progress:
    """The progress of a training, without model, optimizer and generators."""

    update: int = 0  # done
    losses: list[LossPoint] = field(default_factory=list)
    gradient_bytes: int = 0
    best: Quality | None = None
    best_tensors: dict[str, Tensor] = field(default_factory=dict)
    resumed_from: int | None = None  # updates that an earlier process did
    seconds: float = 0.0  # of all processes, up to the last checkpoint or the end

    def add(self, loss: float, rate: float, gradient_bytes: int) -> None:
        """Record one more update."""
        self.update += 1
        self.losses.append(LossPoint(update=self.update, loss=loss, learning_rate=rate))
        self.gradient_bytes = max(self.gradient_bytes, gradient_bytes)


def changing_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes: trainable parameters, and every buffer."""
    parameters = {f"parameter/{name}": value for name, value in model.named_parameters() if value.requires_grad}
    return {**parameters, **{f"buffer/{name}": value for name, value in model.named_buffers()}}


@torch.no_grad()
def restore_tensors(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values, all or none, into the tensors of `changing_tensors`."""
    own = changing_tensors(model) if values else {}
    for name, value in own.items():
        value.copy_(values[name])


class Saver:
    """Writes and reads the checkpoints of one training; `identity` is what must be the same to resume."""

    def __init__(
        self, folder: Path, model: nn.Module, stepper: torch.optim.Optimizer, identity: Mapping[str, Any]
    ) -> None:
        self.folder, self.model, self.optimizer, self.identity = Path(folder), model, stepper, identity

    def save(self, progress: Progress) -> None:
        """Write `update-00000050` after that many updates, then remove all but the last two."""
        tensors = changing_tensors(self.model)
        tensors.update({f"best/{name}": value for name, value in progress.best_tensors.items()})
        optimizer_tensors, optimizer_tree = checkpoint.pack(optimizer.state_dict(self.optimizer), "optimizer")
        random_tensors, random_tree = checkpoint.pack(checkpoint.random_state(), "random")
        state = {
            "identity": self.identity,
            "update": progress.update,
            "losses": [[point.update, point.loss, point.learning_rate] for point in progress.losses],
            "gradient_bytes": progress.gradient_bytes,
            "seconds": progress.seconds,
            "best": None if progress.best is None else progress.best.model_dump(mode="json"),
            "optimizer": optimizer_tree,
            "random": random_tree,
        }
        target = self.folder / f"update-{progress.update:08d}"
        checkpoint.save(target, {**tensors, **optimizer_tensors, **random_tensors}, state)
        checkpoint.remove_old(self.folder)

    def restore(self, updates: int) -> Progress:
        """Restore model, optimizer and generators from the last complete checkpoint, if there is one.

        Once all `updates` are done, threads, torch and device may differ: nothing is left that they could change.
        """
        folder = checkpoint.latest(self.folder)
        if folder is None:
            return Progress()
        tensors, state = checkpoint.load(folder)
        was = state["identity"]
        done = int(state["update"])
        compared = [key for key in self.identity if done < updates or key not in ("threads", "torch", "device")]
        differing = [key for key in compared if was.get(key) != self.identity[key]]
        if differing:
            raise EdgetuneError(
                "this checkpoint belongs to another training, or would not resume bit-identically: "
                + "; ".join(f"{key} was {was.get(key)!r} and is {self.identity[key]!r}" for key in differing),
                got=str(folder),
                action="restore these (threads: OMP_NUM_THREADS), or start again in another folder",
            )
        restore_tensors(self.model, tensors)
        optimizer.load_state_dict(self.optimizer, checkpoint.unpack(tensors, state["optimizer"]))
        checkpoint.set_random_state(checkpoint.unpack(tensors, state["random"]))
        losses = [LossPoint(update=int(u), loss=loss, learning_rate=rate) for u, loss, rate in state["losses"]]
        best = None if state["best"] is None else Quality.model_validate(state["best"])
        best_tensors = {name: tensors[f"best/{name}"] for name in changing_tensors(self.model)} if best else {}
        seconds = float(state.get("seconds", 0.0))
        return Progress(done, losses, state["gradient_bytes"], best, best_tensors, done, seconds)


def training_identity(model: nn.Module, settings: Train, rows: int, seed: int) -> dict[str, Any]:
    """What must be the same for a resumed training to end with the same bits; frozen weights by a checksum."""
    frozen = hashlib.sha256()
    for name, value in model.named_parameters():
        if not value.requires_grad:
            frozen.update(name.encode())
            frozen.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    shapes = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in changing_tensors(model).items()]
    return {
        "settings": settings.model_dump(mode="json", exclude=set(CHANGES_NO_RESULT)),
        "seed": seed,
        "rows": rows,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "device": device_of(model).type,
        "trained": hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:16],
        "frozen": frozen.hexdigest()[:16],
    }


class Interrupts:
    """Defers the first Ctrl-C until the current update is done; the second one takes effect immediately.

    Only the main thread can do so. Elsewhere, and with `wait` off, Ctrl-C is not changed.
    """

    def __init__(self, wait: bool) -> None:
        self.wait = wait and threading.current_thread() is threading.main_thread()
        self.seen = False

    def __enter__(self) -> Interrupts:
        if self.wait:
            self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.wait:
            signal.signal(signal.SIGINT, self.before or signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True
