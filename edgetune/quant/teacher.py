"""Distillation from the model as it was in floating point: a frozen copy runs on the same inputs.

The divergence of the student's logits from the copy's is a penalty of the technique that rounds, so any training loop
that adds `et.penalty(model)` distils. Parameters that are frozen are shared, not copied. The student computes without
dropout, whose noise would outweigh what rounding changes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.core.divergence import mean_divergence
from edgetune.core.inputs import device_of, logits_of, token_mask
from edgetune.lean.frozen import remove_hooks
from edgetune.lean.reads import FirstForward
from edgetune.quant.fake import FakeQuantized


class Teacher:
    """A forward hook on a model that runs a frozen copy of it while the model trains."""

    def __init__(self, model: nn.Module) -> None:
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.model = copy.deepcopy(model, memo=dict(frozen)).eval()
        remove_hooks(self.model, FirstForward)
        for parameter in self.model.parameters():
            if id(parameter) not in frozen:
                parameter.requires_grad_(False)
        self.outputs: tuple[Tensor, Tensor, Tensor | None] | None = None  # of the last batch, with its token mask
        self.switched: list[nn.Module] = []  # to evaluation mode, during a training forward

    def begin(self, module: nn.Module, _: object) -> None:
        """Switch off dropout for a training forward."""
        if module.training and torch.is_grad_enabled():
            self.switched = [each for each in module.modules() if each.training and not _keeps_mode(each)]
        for each in self.switched:
            each.training = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Run the copy on the inputs of a training forward; `output` is `None` if that failed."""
        trains, self.outputs = bool(self.switched), None
        for each in self.switched:
            each.training = True
        self.switched = []
        if output is None or not trains:
            return
        with torch.no_grad():
            target = logits_of(self.model.to(device_of(module))(*args, **kwargs))
        self.outputs = logits_of(output), target, token_mask(kwargs)

    def divergence(self) -> Tensor | None:
        """Of the last training forward, once; `None` if there was none."""
        outputs, self.outputs = self.outputs, None
        return None if outputs is None else divergence(*outputs)

    def __getstate__(self) -> dict[str, Any]:
        """Without the outputs, whose graphs cannot be copied."""
        return {**self.__dict__, "outputs": None}


def add_teacher(model: nn.Module) -> None:
    """Distil the model from what it computes now."""
    teacher = Teacher(model)
    model.register_forward_pre_hook(teacher.begin)
    model.register_forward_hook(teacher, with_kwargs=True, always_call=True)


def teacher_of(model: nn.Module) -> Teacher | None:
    """The model's teacher, if it has one."""
    return next((hook for hook in model._forward_hooks.values() if isinstance(hook, Teacher)), None)


def latest_divergence(model: nn.Module) -> Tensor | None:
    """Of the last training forward, once; `None` without a teacher or such a forward."""
    teacher = teacher_of(model)
    return None if teacher is None else teacher.divergence()


def remove_teacher(model: nn.Module) -> None:
    """Drop the copy."""
    for key in [key for key, hook in model._forward_hooks.items() if isinstance(hook, Teacher)]:
        del model._forward_hooks[key]
        model._forward_hooks_with_kwargs.pop(key, None)
        model._forward_hooks_always_called.pop(key, None)
    for key, begin in list(model._forward_pre_hooks.items()):
        if isinstance(getattr(begin, "__self__", None), Teacher):
            del model._forward_pre_hooks[key]


def _keeps_mode(module: nn.Module) -> bool:
    """Batch norms, layers that compute rounded, and blocks that are computed again for backward."""
    kinds = (nn.modules.batchnorm._BatchNorm, FakeQuantized)
    return isinstance(module, kinds) or bool(getattr(module, "gradient_checkpointing", False))


def divergence(logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Kullback-Leibler divergence of `logits` from the teacher's, the mean over rows, or over tokens that `mask` has.

    Of single numbers, as in regression, half the mean squared difference. Logits `(rows, classes)` or `(rows, tokens,
    classes)`.
    """
    if logits.dim() < 2 or logits.shape[-1] == 1:
        return functional.mse_loss(logits.float(), target.float()) / 2
    if mask is not None and mask.shape == logits.shape[:-1]:
        logits, target = logits[mask], target[mask]
    return mean_divergence(logits.float(), target.float())
