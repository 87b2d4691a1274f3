"""A language model with a classifier of texts on it, which alone goes through low-rank paths beside the layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.adapt.widths import first_input
from edgetune.core.errors import EdgetuneError
from edgetune.core.wrapped import keep_base_keys


class GuardPath(nn.Module):
    """Adds `scale * x A^T B^T` to the output of a layer, with A `(rank, in)` and B `(out, rank)`, which starts at 0."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float) -> None:
        super().__init__()
        self.A, self.B, self.scale = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False), scale
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """The layer's output `(..., out)` for `x` `(..., in)`, with the path."""
        added: Tensor = self.B(self.scale * self.A(x.to(self.A.weight.dtype)))
        return output + added.to(output.dtype)


class GuardedModel(nn.Module):
    """A causal language model `base` of transformers, and its guard: `forward` returns logits `(batch, classes)`.

    The guard is a linear head on the state of the last token that is no padding. Its paths are there while `forward`
    runs, and only then: `base` computes and generates bit by bit what it did before, whatever the guard has learned.
    """

    def __init__(self, base: Any, widths: Mapping[str, tuple[int, int]], settings: Any) -> None:
        """`widths`: of the layers with a path; `settings` have `rank`, `alpha` and `classes`, and are saved with it."""
        super().__init__()
        self.base: Any = base
        self.settings, self.layers = settings, tuple(widths)
        self.classes: tuple[str, ...] = settings.classes
        rank, scale = settings.rank, settings.alpha / settings.rank
        paths = {name: GuardPath(inputs, outputs, rank, scale) for name, (inputs, outputs) in widths.items()}
        self.paths = nn.ModuleDict({name.replace(".", "__"): path for name, path in paths.items()})
        self.head = nn.Linear(base.get_output_embeddings().weight.shape[-1], len(self.classes))
        keep_base_keys(self)
        self.train(base.training)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of the classes for tokens `(batch, tokens)`, padded on either side; without a mask there is none."""
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.base.modules()):
            raise EdgetuneError(
                "gradient checkpointing runs the blocks again in backward, where the guard's paths are not there",
                action="turn it off in the model that the guard is on",
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with self._through_paths():
            states: Tensor = self.base.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False)[0]
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        state = states[torch.arange(len(last), device=last.device), last]
        logits: Tensor = self.head(state.to(self.head.weight.dtype))
        return logits

    @contextmanager
    def _through_paths(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for name, path in zip(self.layers, self.paths.values(), strict=True):
                layer = self.base.get_submodule(name)
                hooks.enter_context(layer.register_forward_hook(_adding(path), with_kwargs=True))
            yield


def _adding(path: nn.Module) -> Any:
    def add(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        added: Tensor = path(first_input(args, kwargs), output)
        return added

    return add
