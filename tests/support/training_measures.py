"""What a training program is held to, measured: arena, step time beside eager, losses beside eager."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from edgetune.core.inputs import Inputs, call, logits_of, tensors_of
from edgetune.core.quiet import silence_libraries
from edgetune.export.training.capture import Loss, LossModule, prepare_copy
from edgetune.export.training.optimizer import eager_like
from edgetune.export.training.step import Batch, eager_losses
from edgetune.program.artifact import Artifact
from edgetune.program.manifest import UpdateRule
from edgetune.runtime.training import TrainingProgram, time_steps_in_child


@dataclass(frozen=True)
class StepTimes:
    """Medians of the same step, in fresh processes for the program; memory is resident memory above the empty one."""

    threads: int
    program_ms: float
    eager_ms: float
    program_peak_mib: float

    @property
    def ratio(self) -> float:
        """The program's time by eager's."""
        return self.program_ms / self.eager_ms


def stock_plan_bytes(model: nn.Module, inputs: Inputs, labels: Tensor, loss: Loss) -> int:
    """Arena of PyTorch's and executorch's own export of the same frozen set: gradients are outputs, portable kernels.

    The weights that train lie in it, as they do in the state of a program of ours.
    """
    from executorch.exir import EdgeCompileConfig, to_edge
    from torch.export.experimental import _export_forward_backward

    step = LossModule(prepare_copy(model), inputs, loss)
    # CPU flash attention's backward has no kernel in executorch
    with silence_libraries(), sdpa_kernel(SDPBackend.MATH):
        exported = torch.export.export(step, (*tensors_of(inputs), labels), strict=False)
        both = _export_forward_backward(exported)
        edge = to_edge(both, compile_config=EdgeCompileConfig(_check_ir_validity=False))
        plan = edge.to_executorch().executorch_program.execution_plan[0]
    return sum(plan.non_const_buffer_sizes)


def loss_difference(
    artifact: Artifact, model: nn.Module, batches: Sequence[Batch], loss: Loss, steps: int, learning_rate: float
) -> float:
    """The largest difference to eager losses over `steps` steps from the same weights."""
    program = TrainingProgram(artifact.path)
    chosen = [batches[n % len(batches)] for n in range(steps)]
    got = [program.step(inputs, labels, learning_rate)[0] for inputs, labels in chosen]
    expected = eager_losses(model, chosen, loss, artifact.training.optimizer, learning_rate)
    return max(abs(a - b) for a, b in zip(got, expected, strict=True))


def step_times(
    artifact: Artifact, model: nn.Module, batch: Batch, loss: Loss, *, threads: int, seconds: float = 3.0,
    rounds: int = 3,
) -> StepTimes:  # fmt: skip
    """The program's step and eager's, interleaved in `rounds`. Medians over all."""
    inputs, labels = batch
    program: list[float] = []
    eager: list[float] = []
    peaks: list[float] = []
    for _ in range(rounds):
        result = time_steps_in_child(artifact.path, (*tensors_of(inputs), labels), threads=threads, seconds=seconds)
        program += result["latencies_ms"][2:] or result["latencies_ms"]
        peaks.append(result["peak_memory_mib"] - result["empty_memory_mib"])
        eager += _eager_ms(model, batch, loss, artifact.training.optimizer, threads, seconds)
    return StepTimes(threads, statistics.median(program), statistics.median(eager), statistics.median(peaks))


def _eager_ms(
    model: nn.Module, batch: Batch, loss: Loss, kind: UpdateRule, threads: int, seconds: float
) -> list[float]:
    inputs, labels = batch
    optimizer = eager_like(kind, model, 1e-4)
    before, training = torch.get_num_threads(), model.training
    torch.set_num_threads(threads)
    model.eval()
    found: list[float] = []
    until = time.perf_counter() + seconds
    try:
        while len(found) < 5 or time.perf_counter() < until:
            begun = time.perf_counter()
            loss(logits_of(call(model, inputs)), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            found.append((time.perf_counter() - begun) * 1e3)
    finally:
        torch.set_num_threads(before)
        model.train(training)
    return found[2:]
