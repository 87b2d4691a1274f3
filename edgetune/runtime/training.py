"""Train with a program on this host, and save and load its state as a checkpoint.

`python -m edgetune.runtime.training FOLDER` is the child's side of `steps_in_child` and `time_steps_in_child`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.files import replace_files
from edgetune.core.inputs import Inputs, tensors_of
from edgetune.core.quiet import silence_libraries
from edgetune.program.artifact import Artifact
from edgetune.program.manifest import SliceSpec
from edgetune.runtime.clock.machine import resident_mib
from edgetune.runtime.clock.runs import load_runtime, read_inputs, serve
from edgetune.runtime.run import ask_child

_PREFIX = "model."  # of the user's names in the program
_MODULE = "edgetune.runtime.training"


class TrainingProgram:
    """A training `.pte` loaded by the runtime: steps, inference, and the state that both share."""

    def __init__(self, path: str | Path) -> None:
        self.artifact = Artifact.load(path, "training")
        self.artifact.check_runtime()
        with silence_libraries():
            program = load_runtime(None)._load_program(str(path))
        self._train, self._forward = program.load_method("train"), program.load_method("forward")

    def step(self, inputs: Inputs, labels: Tensor, learning_rate: float) -> tuple[float, Tensor]:
        """One update. Returns the loss before it, and the logits."""
        given = (*map(_contiguous, (*tensors_of(inputs), labels)), torch.tensor(learning_rate))
        loss, logits = self._train.call(given)
        return loss.item(), logits

    def forward(self, inputs: Inputs) -> Tensor:
        """The logits with the current weights."""
        (logits,) = self._forward.call(tuple(map(_contiguous, tensors_of(inputs))))
        return logits  # type: ignore[no-any-return]

    def state(self) -> dict[str, Tensor]:
        """Copies of the trained tensors by their names in the model, and of the optimizer's, such as
        `<name>_momentum`."""
        return {name: tensor.clone() for name, tensor in self._tensors().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from this state. Raises unless its names and shapes are the program's."""
        own = self._tensors()
        fitting = set(own) == set(state) and all(own[n].shape == t.shape for n, t in state.items())
        if not fitting:
            raise EdgetuneError(
                "the checkpoint is not one of this program",
                got=sorted(set(state) ^ set(own)) or "other shapes",
                allowed=sorted(own),
                exit_code=Exit.EXPORT,
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors in the program's memory."""
        training = self.artifact.training
        trained = [spec.name for spec in training.trainable]
        names = (*trained, *training.optimizer.state_names(trained))
        return {name: self._train.get_attribute(_PREFIX + name) for name in names}

    def save(self, path: str | Path) -> None:
        """Write the state as safetensors, with the metadata that `pull` needs."""
        from safetensors.torch import save_file

        path = Path(path)
        training = self.artifact.training
        about = {
            "program": self.artifact.manifest.sha256,
            "optimizer": training.optimizer.model_dump_json(),
            "slices": json.dumps([spec.model_dump() for spec in training.slices]),
        }
        with replace_files(path) as (temporary,):
            save_file(self.state(), temporary, metadata=about)

    def restore(self, path: str | Path) -> None:
        """Read what `save` wrote."""
        state, _ = read_checkpoint(Path(path))
        self.load_state(state)


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()  # the runtime reads memory in order, whatever the strides say


def train_pte(
    path: str | Path,
    batches: Iterable[tuple[Inputs, Tensor]],
    learning_rate: float,
    *,
    steps: int | None = None,
    resume: str | Path | None = None,
    checkpoint: str | Path | None = None,
) -> list[float]:
    """Train with the program at `path` on this host. Returns the loss of each step.

    Continues from the checkpoint `resume`, and writes one to `checkpoint` at the end. Stops after `steps`, or at
    the end of the batches. The batches must have the shapes that the program was exported for.
    """
    program = TrainingProgram(path)
    if resume is not None:
        program.restore(resume)
    losses: list[float] = []
    for inputs, labels in batches:
        if steps is not None and len(losses) >= steps:
            break
        losses.append(program.step(inputs, labels, learning_rate)[0])
    if checkpoint is not None:
        program.save(checkpoint)
    return losses


def steps_in_child(path: Path, batches: Sequence[tuple[Tensor, ...]], learning_rate: float) -> list[float]:
    """One step per batch `(inputs..., labels)` in a child process, since a bad program can crash its process.

    Raises `EdgetuneError` (exit code 5) if the program does not load or run, or the child dies.
    """
    result, _ = ask_child(_MODULE, path, {"learning_rate": learning_rate, "seconds": 0.0}, batches)
    return [float(loss) for loss in result["losses"]]


def time_steps_in_child(path: Path, batch: tuple[Tensor, ...], *, threads: int, seconds: float) -> dict[str, Any]:
    """Step times in a fresh process: `latencies_ms`, `peak_memory_mib`, `empty_memory_mib` and `load_ms`."""
    request = {"learning_rate": 1e-4, "seconds": seconds, "threads": threads}
    return ask_child(_MODULE, path, request, [batch], fresh=True)[0]


def _answer(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    batches = read_inputs(folder, request["rows"])
    rate = torch.tensor(request["learning_rate"])
    runtime = load_runtime(request.get("threads"))
    empty_mib = resident_mib("VmRSS")
    started = time.perf_counter()
    method = runtime._load_program(request["path"]).load_method("train")
    load_ms = (time.perf_counter() - started) * 1e3
    losses: list[float] = []
    latencies: list[float] = []
    until = time.perf_counter() + float(request["seconds"])
    while len(losses) < len(batches) or time.perf_counter() < until:
        batch = (*batches[len(losses) % len(batches)], rate)
        begun = time.perf_counter()
        outputs = method.call(batch, clone_outputs=False)
        latencies.append((time.perf_counter() - begun) * 1e3)
        losses.append(outputs[0].item())
    return {
        "losses": losses,
        "latencies_ms": latencies,
        "load_ms": load_ms,
        "peak_memory_mib": resident_mib("VmHWM"),
        "empty_memory_mib": empty_mib,
    }


def main(folder: Path) -> int:
    """Answer the request in the folder."""
    return serve(folder, _answer)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], tuple[SliceSpec, ...]]:
    """The state that `save` wrote, by name, and the slices of layers that trained in part."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise EdgetuneError("no such checkpoint", got=str(path), exit_code=Exit.EXPORT)
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise EdgetuneError(
            f"the checkpoint cannot be read: {error}", where=str(path), exit_code=Exit.EXPORT
        ) from error
    return state, tuple(SliceSpec.model_validate(s) for s in json.loads(about.get("slices", "[]")))
