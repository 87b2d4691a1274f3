"""A model's training step as one ExecuTorch program: forward, loss, the backward of what trains, and its update.

The weights that train, and their momentum, are state of the program, changed in place by the method `train`; the
method `forward` infers with the same state. Everything that is frozen is lowered as in any other program.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.inputs import Inputs, call, logits_of, rows_of, tensors_of
from edgetune.core.quiet import quiet
from edgetune.core.registry import require
from edgetune.export import targets
from edgetune.export.lower import Lowered
from edgetune.export.pipeline import call_of, manifest_of
from edgetune.export.rows import names_of, specs_of
from edgetune.export.training import capture, memory, passes, sequence, update
from edgetune.export.training.capture import Joint, Loss
from edgetune.export.training.draft import Draft
from edgetune.export.training.lower import FORWARD, TRAIN, compile_training
from edgetune.program.artifact import Artifact, write_pair
from edgetune.program.beside import check_program_path
from edgetune.program.manifest import Call, Manifest, SliceSpec, TrainingParity, TrainingSpec
from edgetune.runtime.training import steps_in_child
from edgetune.sparse.sliced import Sliced

Batch = tuple[Inputs, Tensor]


@dataclass(frozen=True)
class Check:
    """What is proven before a program gets its name: so many steps beside eager SGD."""

    steps: int = 5
    learning_rate: float = 0.01
    max_loss_difference: float = 1e-4


def export_training(
    model: nn.Module,
    example_inputs: Inputs,
    example_labels: Tensor,
    path: str | Path,
    *,
    loss: Loss = nn.functional.cross_entropy,
    target: str = "xnnpack",
    momentum: float = 0.0,
    forward_rows: int = 1,
    check_batches: Sequence[Batch] | None = None,
    check: Check | None = None,
) -> Artifact:
    """Lower the training step of `model` to `path` (a `.pte`), compare it with eager SGD, and write `model.json`.

    All parameters that require a gradient are trained, in evaluation mode: without dropout and with frozen
    statistics. The shapes are those of the examples; `forward` takes `forward_rows` rows. `train` takes the inputs
    by position, the labels and the learning rate (a scalar), and returns the loss and the logits. Raises
    `EdgetuneError` (exit code 5) if the step cannot be lowered, or if the losses of `check.steps` steps over
    `check_batches` (by default only the example) differ from those of eager mode by more than
    `check.max_loss_difference`. Then nothing is left at `path`.
    """
    with quiet():
        require("executorch", "export")
    path, check = Path(path), check or Check()
    check_program_path(path)
    chosen = targets.find(target)
    if target not in ("xnnpack", "portable"):
        raise EdgetuneError("this target cannot train", got=target, allowed=["xnnpack", "portable"],
                            exit_code=Exit.EXPORT)  # fmt: skip
    batches = list(check_batches or [(example_inputs, example_labels)])
    prepared = capture.prepared(model)
    capture.trainable(prepared)
    few = rows_of(example_inputs, 0, forward_rows)
    with quiet():
        programs = {
            TRAIN: step_program(prepared, example_inputs, example_labels, loss, momentum),
            FORWARD: forward_program(prepared, few),
        }
        with torch.no_grad():
            lowered, state_bytes = compile_training(programs, chosen)
    given = dict(zip(names_of(example_inputs), tensors_of(example_inputs), strict=True))
    some = dict(zip(given, tensors_of(few), strict=True))
    whole = {**given, "labels": example_labels, "learning_rate": torch.tensor(check.learning_rate)}
    calls = (
        _call(FORWARD, lowered[FORWARD], programs[FORWARD], some, ("logits",)),
        _call(TRAIN, lowered[TRAIN], programs[TRAIN], whole, ("loss", "logits")),
    )

    def prove(partial: Path) -> Manifest:
        training = _training(model, state_bytes, momentum, compared(partial, model, batches, loss, momentum, check))
        return manifest_of("training", lowered[TRAIN], calls, chosen, None, path, training=training)

    return Artifact(path, write_pair(path, lowered[TRAIN].data, prove))


def step_program(prepared: nn.Module, inputs: Inputs, labels: Tensor, loss: Loss, momentum: float) -> ExportedProgram:
    """Forward, loss, backward and update of a prepared model as one graph."""
    joint = capture.joint(prepared, inputs, labels, loss)
    with torch.no_grad():
        return _with_update(joint, momentum)


def _with_update(joint: Joint, momentum: float) -> ExportedProgram:
    draft = Draft(joint.program, set(joint.gradients))
    results = [s.arg.name for s in joint.program.graph_signature.output_specs
               if s.kind in (OutputKind.LOSS_OUTPUT, OutputKind.USER_OUTPUT)]  # fmt: skip
    gradients = {target: draft.named(name) for target, name in joint.gradients.items()}
    updates = update.updates(draft, gradients, momentum)
    draft.returns([*updates.values(), *(draft.named(name) for name in results)])
    memory.merge_equal(draft)
    passes.rewrite(draft)
    memory.recompute(draft)
    memory.sink_views(draft)
    values: tuple[fx.Node, ...] = draft.graph.output_node().args[0]  # type: ignore[assignment]
    updates = dict(zip(updates, values))  # noqa: B905  rewriting has replaced some nodes
    sequence.order(draft, updates)
    return draft.finished(updates, list(values[len(updates) :]))


def forward_program(prepared: nn.Module, inputs: Inputs) -> ExportedProgram:
    """The forward pass of a prepared model, on the same state."""
    state = {f"{capture.CHILD}.{name}" for name in capture.trainable(prepared)}
    with torch.no_grad():
        program = capture.forward(prepared, inputs)
        draft = Draft(program, state)
        outputs = [draft.named(s.arg.name) for s in program.graph_signature.output_specs]
        draft.returns(outputs)
        memory.merge_equal(draft)
        passes.rewrite(draft)
        values: tuple[fx.Node, ...] = draft.graph.output_node().args[0]  # type: ignore[assignment]
        return draft.finished({}, list(values))


def compared(
    path: Path, model: nn.Module, batches: Sequence[Batch], loss: Loss, momentum: float, check: Check
) -> TrainingParity:
    """Losses of some steps in the real runtime, in a process of its own, beside eager SGD from the same weights.

    Raises `EdgetuneError` where they differ by more than `check` allows, or are not finite.
    """
    chosen = [batches[n % len(batches)] for n in range(check.steps)]
    flat = [(*tensors_of(inputs), labels) for inputs, labels in chosen]
    got = steps_in_child(path, flat, check.learning_rate)
    expected = eager_losses(model, chosen, loss, momentum, check.learning_rate)
    worst = max(abs(a - b) if a == a else float("inf") for a, b in zip(got, expected, strict=True))
    if not worst <= check.max_loss_difference:
        raise EdgetuneError(
            "the losses of the program differ from those of eager mode",
            where=str(path),
            got=f"a difference of {worst:.3g} within {check.steps} steps",
            allowed=[f"at most {check.max_loss_difference:.3g}"],
            action="check fewer steps with a smaller learning rate, or export for target='portable'",
            exit_code=Exit.EXPORT,
        )
    return TrainingParity(steps=check.steps, learning_rate=check.learning_rate, max_abs_loss_difference=worst,
                          losses=tuple(got))  # fmt: skip


def eager_losses(
    model: nn.Module, batches: Sequence[Batch], loss: Loss, momentum: float, learning_rate: float
) -> list[float]:
    """What PyTorch gives for the same steps, on a copy, in evaluation mode."""
    eager = copy.deepcopy(model).cpu().eval()
    optimizer = torch.optim.SGD([p for p in eager.parameters() if p.requires_grad], learning_rate, momentum)
    found = []
    for inputs, labels in batches:
        value = loss(logits_of(call(eager, inputs)), labels)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found.append(value.item())
    return found


def _training(model: nn.Module, state_bytes: int, momentum: float, parity: TrainingParity) -> TrainingSpec:
    trained = capture.trainable(model)
    return TrainingSpec(
        momentum=momentum,
        trainable=specs_of(tuple(trained.values()), tuple(trained)),
        slices=tuple(
            SliceSpec(layer=name, dim=layer.dim, indices=tuple(layer.indices.tolist()))
            for name, layer in model.named_modules()
            if isinstance(layer, Sliced)
        ),
        state_bytes=state_bytes,
        parity=parity,
    )


def _call(
    name: str, lowered: Lowered, program: ExportedProgram, inputs: dict[str, Tensor], outputs: Sequence[str]
) -> Call:
    """A method of the program; its outputs stand behind what it updates."""
    values = [node.meta["val"] for node in program.graph.output_node().args[0]][-len(outputs) :]
    return call_of(name, lowered, specs_of(tuple(inputs.values()), tuple(inputs)), specs_of(tuple(values), outputs))
