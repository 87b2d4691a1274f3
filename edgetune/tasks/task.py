"""What is minimized and what is reported for each task: cross entropy; accuracy, or perplexity for a language model."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.inputs import call, device_of, logits_of, moved
from edgetune.core.ledger import Quality
from edgetune.core.modes import undisturbed
from edgetune.data.dataset import IGNORED_LABEL, Dataset, Split, Task
from edgetune.lean.head import cross_entropy


def balanced_weights(task: Task, dataset: Dataset) -> Tensor:
    """The weight of each class in the loss, fp32 `(classes,)`: inverse to its share of the training rows, mean 1 a row.

    King and Zeng, Logistic Regression in Rare Events Data, 2001, section 4.1: rows / (classes * rows of the class).
    """
    if task == "causal-lm" or dataset.train.labels is None:
        raise EdgetuneError(
            "class_weights needs classes, and a language model has none", action="leave out train.class_weights"
        )
    counts = torch.bincount(torch.tensor(dataset.train.labels), minlength=len(dataset.classes)).float()
    return len(dataset.train) / (len(dataset.classes) * counts)


def loss(task: Task, logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Mean cross entropy, a scalar; with `class_weights`, `(classes,)`, the weighted mean.

    `logits` are `(batch, classes)` with labels `(batch,)`; for a causal language model `(batch, tokens, vocabulary)`
    with labels `(batch, tokens)`, where position n is judged by the label of position n + 1.
    """
    if task == "causal-lm":  # labels are moved, not logits: a frozen head then keeps none of them
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    if class_weights is not None:
        return F.cross_entropy(logits, labels, class_weights.to(logits), ignore_index=IGNORED_LABEL)
    return cross_entropy(logits, labels, ignore_index=IGNORED_LABEL)


def _aligned(task: Task, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `(items, classes)` and labels `(items,)`, in fp32, which a mean over many tokens needs."""
    if task == "causal-lm":
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return logits.float(), labels.to(logits.device)


def quality(task: Task, model: nn.Module, split: Split, batch_size: int = 64) -> Quality:
    """Accuracy in per cent, or the perplexity of all tokens of the split together.

    Leaves each module's training mode and the random generators as they were. Raises `EdgetuneError` for outputs that
    are not finite.
    """
    total, count = 0.0, 0
    for _, logits, labels in _outputs(task, model, split, batch_size):
        if task == "causal-lm":
            total += F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum").item()
            count += int((labels != IGNORED_LABEL).sum())
        else:
            total += int((logits.argmax(1) == labels).sum())
            count += len(labels)
    if not count:
        raise EdgetuneError("there are no rows to measure quality on", got=f"{len(split)} rows")
    if task == "causal-lm":
        # above e^700 a float ends; such a model is broken and the number says so
        return Quality(metric="perplexity", value=math.exp(min(total / count, 700.0)), rows=len(split))
    return Quality(metric="accuracy_pct", value=100 * total / count, rows=len(split))


def class_logits(task: Task, model: nn.Module, split: Split, batch_size: int = 64) -> Tensor:
    """Logits `(rows, classes)` on the CPU, in the split's own order. Not for a causal language model."""
    if task == "causal-lm":
        raise EdgetuneError("a causal language model predicts no class for a row", got=task)
    order: list[int] = []
    parts: list[Tensor] = []
    for indices, logits, _ in _outputs(task, model, split, batch_size):
        order += indices
        parts.append(logits.cpu())
    stacked = torch.cat(parts)
    return torch.empty_like(stacked).index_copy_(0, torch.tensor(order), stacked)


def predictions(task: Task, model: nn.Module, split: Split, batch_size: int = 64) -> Tensor:
    """The class of each row, int64 `(rows,)`, in the split's own order. Not for a causal language model."""
    return class_logits(task, model, split, batch_size).argmax(1)


def _outputs(task: Task, model: nn.Module, split: Split, batch_size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Indices, aligned logits and labels of each batch. Texts go by length, so that little padding is computed."""
    order = list(range(len(split)))
    if split.lengths is not None:
        lengths = split.lengths
        order.sort(key=lambda index: lengths[index])
    device = device_of(model)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        inputs, labels = split.batch(indices)
        # entered anew for each batch: a caller that stops in between leaves nothing changed
        with undisturbed(model), torch.no_grad():
            logits = logits_of(call(model, moved(inputs, device)))
        if not torch.isfinite(logits).all():
            raise EdgetuneError(
                "the model's outputs are not finite numbers",
                action="check the previous step for a high learning rate or an overflowing quantization",
                exit_code=Exit.DATA,
            )
        yield (indices, *_aligned(task, logits, labels))
