"""The task of each row of a batch, on its way from a model's inputs to the routers of its adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.lean.frozen import Hook

INPUT = "task_ids"


class TaskIds(Hook):
    """Takes `task_ids` `(rows,)` out of a model's inputs, and gives them to the routers that a forward calls.

    They stay until the next forward, since activation checkpointing computes layers again in backward.
    """

    def __init__(self, tasks: Sequence[str], default: str | None) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.default = None if default is None else self.tasks.index(default)
        self.ids = torch.tensor([self.default or 0])  # one for all rows

    def choose(self, task: int) -> None:
        """Give all rows this task until the model's next forward."""
        self.ids = torch.tensor([task])

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        """Take the ids of this batch, or the default."""
        ids = kwargs.pop(INPUT, None)
        if ids is None and self.default is None:
            raise EdgetuneError(
                f"the inputs have no {INPUT}, by which the adapters know the task of each row",
                action=f'give the model {INPUT}=..., the number of the task of each row, or set "task"',
            )
        self.ids = torch.tensor([self.default]) if ids is None else ids
        outside = [] if ids is None else [int(i) for i in ids.unique() if not 0 <= i < len(self.tasks)]
        if outside:
            raise EdgetuneError(f"{INPUT}: there are {len(self.tasks)} tasks, from 0 on", got=outside)
        return lambda: None

    def give(self, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The arguments of a router, with the ids of its rows."""
        x: Tensor = kwargs["input_ids"]  # peft's name for the layer's input
        if x.dim() != 3 or len(self.ids) not in (1, len(x)):
            raise EdgetuneError(
                "an adapter with tasks is for layers over (rows, tokens, width), with a task for each row",
                got=f"an input of shape {tuple(x.shape)} and {len(self.ids)} {INPUT}",
                action="leave this layer out with skip",
            )
        return args, {**kwargs, INPUT: self.ids.to(x.device).expand(len(x))}
