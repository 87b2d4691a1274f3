"""The optimizer of a training: its state in 32 or 8 bits, and steps inside backward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.peft_layers import b_matrices
from edgetune.core.quiet import silence_libraries
from edgetune.core.registry import require

if TYPE_CHECKING:
    from edgetune.train.settings import Train

_PARTS = ("codes", "scale", "qmap")  # of torchao's 8-bit state


def faster_parameters(settings: Train, model: nn.Module) -> list[nn.Parameter]:
    """What learns `learning_rate_ratio` times as fast. Raises `EdgetuneError` for a ratio where there is nothing."""
    if settings.learning_rate_ratio == 1:
        return []
    faster = b_matrices(model)
    if not faster:
        raise EdgetuneError(
            "learning_rate_ratio: no B matrix of a LoRA is trainable, which alone would learn faster",
            got=settings.learning_rate_ratio,
            action="apply lora to linear or convolutional layers first, or leave learning_rate_ratio out",
        )
    return faster


def build(
    settings: Train, parameters: Sequence[nn.Parameter], faster: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """AdamW or SGD. Biases and norms, whose tensors have one dimension, are not decayed.

    Those of `parameters` that are in `faster` learn at `learning_rate_ratio` times the rate, schedule and decoupled
    weight decay included (LoRA+; Hayou et al., 2024, arXiv:2402.12354: the rates of B and A have a fixed ratio).

    With `state_bits` 8 the two moments of AdamW are stored in 8 bits, in blocks of 256 values with a scale each
    (Dettmers et al., 2021, arXiv:2110.02861; torchao's); tensors below 4,096 values keep 32 bits.
    """
    ratio, decay, fast = settings.learning_rate_ratio, settings.weight_decay, {id(p) for p in faster}
    matrices = [p for p in parameters if p.dim() >= 2]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in matrices if id(p) not in fast], "weight_decay": decay, "ratio": 1.0},
        {"params": [p for p in matrices if id(p) in fast], "weight_decay": decay, "ratio": ratio},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "ratio": 1.0},
    ]
    groups = [{**group, "lr": settings.learning_rate * group["ratio"]} for group in groups if group["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
    if settings.state_bits == 8:
        with silence_libraries():
            torchao = require("torchao.optim", "train with state_bits: 8")
        adamw: torch.optim.Optimizer = torchao.AdamW8bit(groups, lr=settings.learning_rate, betas=settings.betas)
        return adamw
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Set the learning rate, of which each group takes its ratio, and return it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's
            group["lr"].fill_(rate * group["ratio"])
        else:
            group["lr"] = rate * group["ratio"]
    return rate


def step(optimizer: torch.optim.Optimizer) -> None:
    """One step, without torchao's compilation, which needs a compiler on the machine."""
    if type(optimizer).__module__.startswith("torchao."):
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
    else:
        optimizer.step()


@contextmanager
def stepping_in_backward(optimizer: torch.optim.Optimizer, group: Any = None) -> Iterator[list[int]]:
    """Inside, update each parameter as soon as its gradient exists, and drop the gradient immediately.

    `group`: the processes (`torch.distributed.group.WORLD`) that train the same model on different rows; each
    gradient is averaged over them first, since DistributedDataParallel would be too late for that.

    Yields a list with one number, the bytes of the largest gradient so far. Raises `EdgetuneError` (exit code 3) in
    backward for a gradient that is not finite, before it reaches the weight.
    """
    largest = [0]

    def update(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if group is not None:
            torch.distributed.all_reduce(gradient, group=group)
            gradient /= torch.distributed.get_world_size(group)
        largest[0] = max(largest[0], gradient.nbytes)
        if not math.isfinite(float(gradient.sum())) and not torch.isfinite(gradient).all():
            raise EdgetuneError(
                "a gradient is not finite",
                got=tuple(parameter.shape),
                action="lower learning_rate, or look for inputs that are not finite",
                exit_code=Exit.DATA,
            )
        step(optimizer)  # only this parameter has a gradient
        parameter.grad = None

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    handles = [p.register_post_accumulate_grad_hook(update) for p in parameters]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state in memory."""
    values = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return sum(sum(p.nbytes for p in _parts(v).values()) if _is_8_bit(v) else v.nbytes for v in values)


def state_dict(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state in plain tensors, for a checkpoint."""
    state = optimizer.state_dict()
    entries = {
        index: {key: _flat(value) if _is_8_bit(value) else value for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def load_state_dict(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore the result of `state_dict`."""
    entries = {
        index: {key: _whole(value) if isinstance(value, dict) else value for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


def _is_8_bit(value: object) -> bool:
    return type(value).__name__ == "OptimState8bit"


def _parts(value: Any) -> dict[str, Tensor]:
    return {name: getattr(value, name) for name in _PARTS}


def _flat(value: Any) -> dict[str, Any]:
    return {**_parts(value), "signed": value.signed, "dtype": str(value.dtype).removeprefix("torch.")}


def _whole(value: dict[str, Any]) -> Tensor:
    from torchao.optim.subclass_8bit import OptimState8bit

    parts = [value[name] for name in _PARTS]
    state: Tensor = OptimState8bit(*parts, value["signed"], getattr(torch, value["dtype"]))
    return state
