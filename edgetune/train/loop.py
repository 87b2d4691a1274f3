"""The training loop: plain, and resumable after a kill at any moment.

The order of the rows is a function of the seed and the epoch alone, and a checkpoint holds everything else that
changes: trainable parameters, buffers, optimizer, random states and the number of the update. So a run that was
killed and resumed ends with the same bits as one that was not (on the CPU, with the same number of threads).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from edgetune.core.apply import penalty
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.holders import is_distributed
from edgetune.core.inputs import Inputs, call, device_of, logits_of, to_device
from edgetune.core.ledger import LossPoint, Quality
from edgetune.core.numbers import MIB
from edgetune.data.rows import IGNORED_LABEL
from edgetune.train import checkpoint
from edgetune.train import optimizer as optimizers
from edgetune.train.distill import Distillation
from edgetune.train.plan import TrainingPlan, TrainingRows
from edgetune.train.reached import GradientWatch
from edgetune.train.resume import Interrupts, Progress, Saver, changing_tensors, restore_tensors, training_identity
from edgetune.train.settings import Train

if TYPE_CHECKING:
    from edgetune.train.prefix.cache import PrefixCache, PrefixReport


@dataclass(frozen=True)
class TrainResult:
    """The figures of one training. The model itself was changed in place and is left in eval mode."""

    losses: tuple[LossPoint, ...]
    gradients_mib: float  # of all trainable parameters at once; of the largest with in_backward
    optimizer_state_mib: float
    resumed_from: int | None = None  # updates that were done already
    best: Quality | None = None  # with keep_best, on the validation rows
    seconds: float = 0.0  # of all parts of a resumed training together
    prefix: PrefixReport | None = None  # with cache_prefix


def train(
    model: nn.Module,
    settings: Train,
    split: TrainingRows,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    *,
    seed: int,
    folder: Path | None = None,
    resume: bool = False,
    teacher: nn.Module | None = None,
    validation: Callable[[nn.Module], Quality] | None = None,
    progress: Callable[[int, int, float, float], None] | None = None,
    prefixes: Path | None = None,
) -> TrainResult:
    """Train `model` in place.

    Args:
        model: its parameters with `requires_grad` are trained.
        settings: the settings of the `train` step.
        split: the training rows.
        loss_fn: `(logits, labels)` -> mean loss over the labels that count.
        seed: determines the order of rows and all random numbers; the global generators are seeded with it.
        folder: for checkpoints, `update-00000050` and so on; none are written if it is not given.
        resume: continue from the last complete checkpoint in `folder`, if there is one.
        teacher: for `settings.distill`.
        validation: for `settings.keep_best`, called after each epoch with the model in eval mode.
        progress: called after each update with `(updates done, updates in total, loss, learning rate)`.
        prefixes: folder for `settings.cache_prefix`; by default `prefixes` in the cache folder of edgetune.

    Raises:
        EdgetuneError: nothing is trainable; no backward reaches a trainable parameter; a loss or gradient is not
            finite; `learning_rate_ratio` without a B matrix; a checkpoint belongs to another training.
        KeyboardInterrupt: on Ctrl-C, after the current update and a checkpoint (immediately on the second Ctrl-C).
    """
    if settings.in_backward and is_distributed(model):
        raise EdgetuneError(
            f"in_backward steps before {type(model).__name__} averages the gradients",
            action="leave in_backward out; in a loop of your own give the plain model to it, inside "
            "edgetune.train.optimizer.stepping_in_backward(optimizer, torch.distributed.group.WORLD)",
        )
    _check(settings, split, folder, resume, teacher, validation)
    parameters = trainable_parameters(model)
    plan = TrainingPlan(settings, split, seed)
    optimizer = optimizers.build(settings, parameters, optimizers.faster_parameters(settings, model))
    seed_everything(seed)
    saver = Saver(folder, model, optimizer, training_identity(model, settings, len(split), seed)) if folder else None
    run = saver.restore(plan.updates) if saver else Progress()
    began = time.perf_counter() - run.seconds
    optimizer.zero_grad(set_to_none=True)
    model.train()
    stepping = optimizers.stepping_in_backward(optimizer) if settings.in_backward else nullcontext(None)
    begun = run.update < plan.updates
    with (
        _prefix(model, settings, split, prefixes) if begun else nullcontext(None) as cache,
        Interrupts(wait=saver is not None) as interrupts,
        stepping as largest_gradient,
        GradientWatch(model) as reached,
        _distillation(model, teacher, settings) as distillation,
    ):
        for update in range(run.update, plan.updates):
            rate = optimizers.set_rate(optimizer, settings.learning_rate * plan.factor(update))
            loss = _backward(model, distillation, loss_fn, plan.batches(update), plan.rows(update), cache)
            _clip_gradients(parameters, settings.clip_norm, loss, update, rate, folder)
            optimizers.step(optimizer)
            run.add(loss, rate, largest_gradient[0] if largest_gradient else _gradient_bytes(parameters))
            optimizer.zero_grad(set_to_none=True)
            reached.step(last=plan.ends_epoch(run.update))
            if settings.keep_best and validation and plan.ends_epoch(run.update):
                _validate(model, validation, run)
            if progress:
                progress(run.update, plan.updates, loss, rate)
            run.seconds = time.perf_counter() - began
            if saver and (interrupts.seen or plan.wants_checkpoint(run.update)):
                saver.save(run)
            if interrupts.seen:
                raise KeyboardInterrupt
    restore_tensors(model, run.best_tensors)
    model.eval()
    return TrainResult(
        losses=tuple(run.losses),
        gradients_mib=run.gradient_bytes / MIB,
        optimizer_state_mib=optimizers.state_bytes(optimizer) / MIB,
        resumed_from=run.resumed_from,
        best=run.best,
        seconds=run.seconds,
        prefix=cache.report if cache else None,
    )


def _prefix(
    model: nn.Module, settings: Train, split: TrainingRows, folder: Path | None
) -> AbstractContextManager[PrefixCache | None]:
    if not settings.cache_prefix:
        return nullcontext(None)
    from edgetune.data.dataset import cache_folder
    from edgetune.train.prefix.cache import PrefixCache

    return PrefixCache.open(
        model,
        split,
        folder=folder or cache_folder() / "prefixes",
        dtype=settings.cache_dtype,
        max_mib=settings.cache_max_mib,
        chunk_rows=min(settings.batch_size, 32),  # never more rows at once than training holds
    )


def _distillation(
    model: nn.Module, teacher: nn.Module | None, settings: Train
) -> AbstractContextManager[Distillation | None]:
    if teacher is None or settings.distill is None:
        return nullcontext(None)
    return Distillation(model, teacher, settings.distill)


def _backward(
    model: nn.Module,
    distillation: Distillation | None,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    batches: Sequence[tuple[Inputs, Tensor]],
    rows: Sequence[Sequence[int]],
    cache: PrefixCache | None,
) -> float:
    """Gradients and value of the mean loss over all labels of an update, however it is cut into batches."""
    device = device_of(model)
    counts = [count_labels(labels) for _, labels in batches]
    if not sum(counts):
        raise EdgetuneError(
            "no label of this batch counts", action="leave out rows without any label", exit_code=Exit.DATA
        )
    total = 0.0
    for (inputs, labels), indices, count in zip(batches, rows, counts, strict=True):
        if not count:
            continue
        inputs, labels = to_device(inputs, device), labels.to(device)
        with cache.rows(indices) if cache else nullcontext():
            logits = logits_of(call(model, inputs))
        loss = loss_fn(logits, labels)
        if distillation is not None:
            loss = distillation.loss(loss, logits, inputs, labels)
        added = penalty(model)
        loss = loss if added is None else loss + added
        loss = loss * (count / sum(counts))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def count_labels(labels: Tensor) -> int:
    """Number of labels that a mean loss divides by: all numbers, and all classes except -100."""
    return labels.numel() if labels.is_floating_point() else int(labels.ne(IGNORED_LABEL).sum())


def _clip_gradients(
    parameters: Sequence[nn.Parameter],
    clip_norm: float | None,
    loss: float,
    update: int,
    rate: float,
    folder: Path | None,
) -> None:
    """Clip the gradients; raise before the optimizer sees a loss or a gradient that is not finite."""
    norm = float(nn.utils.clip_grad_norm_(parameters, math.inf if clip_norm is None else clip_norm))
    if math.isfinite(loss) and math.isfinite(norm):
        return
    kept = checkpoint.latest(folder) if folder is not None else None
    problem = f"the loss is {loss}" if not math.isfinite(loss) else f"the loss is {loss:.4g} but its gradient is {norm}"
    raise EdgetuneError(
        f"update {update + 1} at learning rate {rate:.3g}: {problem}"
        + (f"; the last good checkpoint is {kept}" if kept else ""),
        action="lower learning_rate, raise warmup_pct, or look for inputs that are not finite",
        exit_code=Exit.DATA,
    )


def _check(
    settings: Train,
    split: TrainingRows,
    folder: Path | None,
    resume: bool,
    teacher: nn.Module | None,
    validation: object,
) -> None:
    if not len(split):
        raise EdgetuneError("there are no training rows", exit_code=Exit.DATA)
    if (settings.distill is None) != (teacher is None):
        raise EdgetuneError("distill and a teacher are needed together", action="give both, or neither")
    if teacher is not None:
        teacher.eval()
    if settings.keep_best and validation is None:
        raise EdgetuneError("keep_best needs validation rows", action="pass validation=, or leave keep_best out")
    if folder is None:
        if resume:
            raise EdgetuneError("resuming needs the folder of the checkpoints", action="pass folder=")
        return
    checkpoint.remove_old(folder)
    if not resume and checkpoint.latest(folder) is not None:
        raise EdgetuneError(
            "this folder contains checkpoints of an earlier training",
            got=str(folder),
            action="pass resume=True to continue it, or choose another folder",
        )


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters. Raises `EdgetuneError` if there are none."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise EdgetuneError(
            "no parameter of the model is trainable",
            action="apply lora or sparse-update first, or set requires_grad on the parameters to train",
        )
    return trainable


def _gradient_bytes(parameters: Sequence[nn.Parameter]) -> int:
    return sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _validate(model: nn.Module, validation: Callable[[nn.Module], Quality], run: Progress) -> None:
    """Copy the weights if they are the best so far; restores the generators."""
    random_state = checkpoint.random_state()
    model.eval()
    quality = validation(model)
    model.train()
    checkpoint.set_random_state(random_state)
    sign = 1 if quality.higher_is_better else -1
    if run.best is None or sign * quality.value > sign * run.best.value:
        run.best = quality
        run.best_tensors = {name: value.detach().clone() for name, value in changing_tensors(model).items()}
