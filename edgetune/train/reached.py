"""Check that backward reaches every trainable parameter: one that it does not reach would silently never change."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, truncate_list

STEPS = 10  # by then each must have had a gradient; an expert may get no tokens in the first batches


class GradientWatch:
    """Watches for first gradients, from `start` to `stop`; a parameter's hook is removed after its first one."""

    def __init__(self, model: nn.Module) -> None:
        self.waiting = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        self.parameters: list[Tensor] = [p for p in model.parameters() if id(p) in self.waiting]
        self.total = len(self.parameters)
        self.handles: dict[int, Any] = {}
        self.steps = 0

    def start(self) -> GradientWatch:
        """Register the hooks."""
        self.handles = {
            id(p): p.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]
            for p in self.parameters
        }
        return self

    def stop(self) -> None:
        """Remove the remaining hooks."""
        for handle in self.handles.values():
            handle.remove()
        self.handles, self.parameters = {}, []

    def __enter__(self) -> GradientWatch:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _note(self, parameter: Tensor) -> None:
        self.waiting.pop(id(parameter), None)  # its hook is taken off later: hooks are being gone through now

    def step(self, last: bool) -> None:
        """After an optimizer's step: judge after ten of them, or after the `last` of the first epoch or of all."""
        self.steps += 1
        for key in [key for key in self.handles if key not in self.waiting]:
            self.handles.pop(key).remove()
        if last or self.steps >= STEPS:
            self.judge()

    def judge(self) -> None:
        """Raise `EdgetuneError`, once, for trainable parameters without a gradient so far.

        Not if none has one, as with a sharded trainer that holds the parameters elsewhere.
        """
        names = self._unreached()
        self.stop()
        if names and len(names) < self.total:
            raise EdgetuneError(
                f"{truncate_list(names, 3)}: trainable, but no backward has reached it in {self.steps} steps; "
                "it would not change",
                action="leave it out of the targets or the scheme, or set requires_grad to False on it",
            )

    def _unreached(self) -> list[str]:
        trains = {id(p) for p in self.parameters if p.requires_grad}  # others were frozen in the meantime
        return [name for key, name in self.waiting.items() if key in trains]
