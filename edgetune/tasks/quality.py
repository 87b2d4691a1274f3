"""Run a model on a split, and measure the quality of its outputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from edgetune.core.divergence import mean_divergence
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.inputs import call, device_of, logits_of, to_device
from edgetune.core.ledger import Answers, Quality, Shift
from edgetune.core.modes import preserve_state
from edgetune.data.dataset import Split
from edgetune.data.rows import IGNORED_LABEL
from edgetune.tasks.task import Batch

_MOST_COMPARED = 2**26  # logits, 256 MiB: of a language model the distributions of some thousand tokens


def quality(model: nn.Module, split: Split, batch_size: int = 64) -> Quality:
    """The metric of the split's task, such as accuracy in per cent.

    Restores each module's training mode and the random generators. Raises `EdgetuneError` for outputs that are not
    finite.
    """
    if not len(split):
        raise EdgetuneError("there are no rows to measure quality on", got="0 rows")
    return split.task.quality(batches_of(model, split, batch_size), split.rows)


def logits_for(model: nn.Module, split: Split, batch_size: int = 64) -> Tensor:
    """Logits `(rows, ...)` on the CPU, in the split's order."""
    order: list[int] = []
    parts: list[Tensor] = []
    for batch in batches_of(model, split, batch_size):
        order += batch.indices
        parts.append(batch.logits.float().cpu())
    stacked = torch.cat(parts)
    return torch.empty_like(stacked).index_copy_(0, torch.tensor(order), stacked)


def answers_on(model: nn.Module, split: Split, batch_size: int = 64) -> Answers | None:
    """The predictions of `model` on a split, counted by class; `None` for a task without classes."""
    if not split.task.has_classes or split.rows.labels is None:
        return None
    return split.task.answers(split.rows, logits_for(model, split, batch_size))


def distributions_on(model: nn.Module, split: Split, batch_size: int = 64) -> Tensor | None:
    """Logarithms of the distributions `(predictions, classes)` that `model` gives on a split, fp32 on the CPU.

    Of a large vocabulary only as many tokens as fit in 256 MiB, the same for every model. `None` for a task whose
    labels are not chosen from classes.
    """
    parts: list[Tensor] = []
    room = _MOST_COMPARED
    for batch in batches_of(model, split, batch_size):
        classes = batch.logits.shape[-1]
        if batch.labels.is_floating_point() or classes < 2:
            return None
        kept = batch.logits[batch.labels != IGNORED_LABEL][: room // classes]
        parts.append(kept.float().log_softmax(-1).cpu())
        room -= kept.numel()
        if room < classes:
            break
    return torch.cat(parts)


def shift_between(before: Tensor, after: Tensor) -> Shift:
    """How far the distributions of a rounded model are from those before, both as `distributions_on` gives them."""
    changed = (before.argmax(-1) != after.argmax(-1)).float().mean()
    divergence = float(mean_divergence(after, before))
    return Shift(kl_divergence=divergence, changed_pct=100 * float(changed), predictions=len(before))


def batches_of(model: nn.Module, split: Split, batch_size: int) -> Iterator[Batch]:
    """The logits of each batch. Texts are sorted by length, to avoid padding."""
    order = list(range(len(split)))
    if split.lengths is not None:
        lengths = split.lengths
        order.sort(key=lambda index: lengths[index])
    device = device_of(model)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        encoded = split.encode_rows(indices)
        inputs, labels = split.task.collate(encoded, split.rows.labels_at(indices))
        # entered for each batch, so that a caller that stops early leaves nothing changed
        with preserve_state(model), torch.no_grad():
            logits = logits_of(call(model, to_device(inputs, device)))
        if not torch.isfinite(logits).all():
            raise EdgetuneError(
                "the model's outputs are not finite numbers",
                action="check the previous step for a high learning rate or an overflowing quantization",
                exit_code=Exit.DATA,
            )
        yield Batch(indices, encoded, logits, labels.to(logits.device))
