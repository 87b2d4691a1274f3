"""Export a model's training step as one ExecuTorch program: forward, loss, backward and update.

Trainable weights and their momentum are the program's state: the method `train` updates it in place, the method
`forward` infers with it. Frozen layers are lowered as in any other program.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.inputs import Inputs, call, logits_of, rows_of, tensors_of
from edgetune.core.quiet import silence_libraries
from edgetune.core.registry import require
from edgetune.export import targets
from edgetune.export.lower import Lowered
from edgetune.export.pipeline import call_of, manifest_of
from edgetune.export.program_inputs import names_of, specs_of
from edgetune.export.training import capture, memory, passes, sequence, update
from edgetune.export.training.capture import JointGraph, Loss
from edgetune.export.training.draft import Draft
from edgetune.export.training.lower import FORWARD, TRAIN, compile_training
from edgetune.export.training.optimizer import choose_optimizer, eager_like
from edgetune.program.artifact import Artifact, write_pair
from edgetune.program.manifest import Call, Manifest, SliceSpec, TrainingParity, TrainingSpec, UpdateRule
from edgetune.program.program_files import check_program_path
from edgetune.runtime.training import steps_in_child
from edgetune.sparse.sliced import Sliced

Batch = tuple[Inputs, Tensor]


@dataclass(frozen=True)
class Check:
    """The comparison with eager mode before a program gets its name."""

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
    optimizer: Literal["sgd", "adamw"] = "sgd",
    momentum: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    forward_rows: int = 1,
    check_batches: Sequence[Batch] | None = None,
    check: Check | None = None,
) -> Artifact:
    """Lower the training step of `model` to `path` (a `.pte`), compare it with PyTorch, and write `model.json`.

    All parameters that require a gradient are trained, in evaluation mode: without dropout and with frozen
    statistics. `optimizer` is SGD with `momentum`, or AdamW with `betas` and a `weight_decay` of tensors other than
    biases and norms, whose two moments are state of the program too. The shapes are those of the examples; `forward`
    takes `forward_rows` rows. `train` takes the inputs by position, the labels and the learning rate (a scalar), and
    returns the loss and the logits. Raises `EdgetuneError` (exit code 5) if the step cannot be lowered, or if the
    losses of `check.steps` steps over `check_batches` (by default only the example) differ from those of eager mode by
    more than `check.max_loss_difference`. Then nothing is left at `path`.
    """
    with silence_libraries():
        require("executorch", "export")
    path, check = Path(path), check or Check()
    rule = choose_optimizer(optimizer, momentum, betas, weight_decay)
    check_program_path(path)
    chosen = targets.find(target)
    if target not in ("xnnpack", "portable"):
        raise EdgetuneError("this target cannot train", got=target, allowed=["xnnpack", "portable"],
                            exit_code=Exit.EXPORT)  # fmt: skip
    batches = list(check_batches or [(example_inputs, example_labels)])
    model_copy = capture.prepare_copy(model)
    capture.trainable_parameters(model_copy)
    few = rows_of(example_inputs, 0, forward_rows)
    with silence_libraries():
        programs = {
            TRAIN: build_step(model_copy, example_inputs, example_labels, loss, rule),
            FORWARD: build_forward(model_copy, few),
        }
        with torch.no_grad():
            lowered, state_bytes = compile_training(programs, chosen)
    inputs = dict(zip(names_of(example_inputs), tensors_of(example_inputs), strict=True))
    forward_inputs = dict(zip(inputs, tensors_of(few), strict=True))
    train_inputs = {**inputs, "labels": example_labels, "learning_rate": torch.tensor(check.learning_rate)}
    calls = (
        _call(FORWARD, lowered[FORWARD], programs[FORWARD], forward_inputs, ("logits",)),
        _call(TRAIN, lowered[TRAIN], programs[TRAIN], train_inputs, ("loss", "logits")),
    )

    def prove(partial: Path) -> Manifest:
        training = _training_spec(model, state_bytes, rule, compare_losses(partial, model, batches, loss, rule, check))
        return manifest_of("training", lowered[TRAIN], calls, chosen, None, path, training=training)

    return Artifact(path, write_pair(path, lowered[TRAIN].data, prove))


def build_step(
    model_copy: nn.Module, inputs: Inputs, labels: Tensor, loss: Loss, optimizer: UpdateRule
) -> ExportedProgram:
    """Forward, loss, backward and update as one graph."""
    joint = capture.capture_joint(model_copy, inputs, labels, loss)
    with torch.no_grad():
        return _add_update(joint, optimizer)


def _add_update(joint: JointGraph, optimizer: UpdateRule) -> ExportedProgram:
    draft = Draft(joint.program, set(joint.gradients))
    results = [s.arg.name for s in joint.program.graph_signature.output_specs
               if s.kind in (OutputKind.LOSS_OUTPUT, OutputKind.USER_OUTPUT)]  # fmt: skip
    gradients = {target: draft.find(name) for target, name in joint.gradients.items()}
    updates = update.add_optimizer(draft, gradients, optimizer)
    draft.set_outputs([*updates.values(), *(draft.find(name) for name in results)])
    memory.merge_equal(draft)
    passes.rewrite(draft)
    memory.recompute(draft)
    memory.sink_views(draft)
    values: tuple[fx.Node, ...] = draft.graph.output_node().args[0]  # type: ignore[assignment]
    updates = dict(zip(updates, values))  # noqa: B905  rewriting has replaced some nodes
    sequence.order_operators(draft, updates)
    return draft.finish(updates, list(values[len(updates) :]))


def build_forward(model_copy: nn.Module, inputs: Inputs) -> ExportedProgram:
    """The forward pass, on the same state."""
    state = {f"{capture.CHILD}.{name}" for name in capture.trainable_parameters(model_copy)}
    with torch.no_grad():
        program = capture.capture_forward(model_copy, inputs)
        draft = Draft(program, state)
        outputs = [draft.find(s.arg.name) for s in program.graph_signature.output_specs]
        draft.set_outputs(outputs)
        memory.merge_equal(draft)
        passes.rewrite(draft)
        values: tuple[fx.Node, ...] = draft.graph.output_node().args[0]  # type: ignore[assignment]
        return draft.finish({}, list(values))


def compare_losses(
    path: Path, model: nn.Module, batches: Sequence[Batch], loss: Loss, optimizer: UpdateRule, check: Check
) -> TrainingParity:
    """Compare the losses of some steps in a child process with those of PyTorch from the same weights.

    Raises `EdgetuneError` if they differ by more than `check` allows, or are not finite.
    """
    chosen = [batches[n % len(batches)] for n in range(check.steps)]
    flat = [(*tensors_of(inputs), labels) for inputs, labels in chosen]
    actual = steps_in_child(path, flat, check.learning_rate)
    expected = eager_losses(model, chosen, loss, optimizer, check.learning_rate)
    worst = max(abs(a - b) if a == a else float("inf") for a, b in zip(actual, expected, strict=True))
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
                          losses=tuple(actual))  # fmt: skip


def eager_losses(
    model: nn.Module, batches: Sequence[Batch], loss: Loss, optimizer: UpdateRule, learning_rate: float
) -> list[float]:
    """PyTorch's losses for the same steps, on a copy, in eval mode."""
    eager = copy.deepcopy(model).cpu().eval()
    eager_optimizer = eager_like(optimizer, eager, learning_rate)
    losses = []
    for inputs, labels in batches:
        value = loss(logits_of(call(eager, inputs)), labels)
        eager_optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        eager_optimizer.step()
        losses.append(value.item())
    return losses


def _training_spec(model: nn.Module, state_bytes: int, optimizer: UpdateRule, parity: TrainingParity) -> TrainingSpec:
    trained = capture.trainable_parameters(model)
    return TrainingSpec(
        optimizer=optimizer,
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
    """The manifest entry of a method; its outputs come after its updates."""
    values = [node.meta["val"] for node in program.graph.output_node().args[0]][-len(outputs) :]
    return call_of(name, lowered, specs_of(tuple(inputs.values()), tuple(inputs)), specs_of(tuple(values), outputs))
