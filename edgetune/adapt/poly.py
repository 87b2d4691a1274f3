"""Poly and multi-head routing through peft: a stock of low-rank skills, which each task mixes in its own way.

Ponti et al., 2022, arXiv:2202.13914: the adapter of a task is `sum_s weight[task, s] skill_s`, the weights a sigmoid of
trained logits, normalized. Caccia et al., 2022, arXiv:2211.03831 (MHR): weights of their own for each head, a part of
the layer's input and output widths. A fixed task is a plain LoRA, `(A B)^T / rank` with the mixed factors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from edgetune.adapt.adapter import Adapter
from edgetune.adapt.files import PREFIX, write_adapter
from edgetune.adapt.inject import ADAPTER, exact_targets
from edgetune.adapt.layer_kinds import Kind, widths_of
from edgetune.adapt.task_ids import TaskIds
from edgetune.core.apply import active_techniques, finalize
from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import replace
from edgetune.core.peft_layers import base_of, is_tuner
from edgetune.core.registry import require
from edgetune.lean.frozen import hook_of, remove_hooks


class Poly(Adapter):
    """Train adapters for several tasks on one frozen base, which share `skills` and mix them task by task.

    The model is called with `task_ids` `(rows,)` beside its inputs: numbers in `tasks`. In training the mixture is
    drawn at random around its weights (relaxed Bernoulli). `heads` above 1 is multi-head routing. `et.split_tasks`
    writes a plain LoRA for each task, which `et.export(..., adapters=...)` puts on one base; `finalize` merges `task`.
    """

    name: ClassVar[str] = "poly"
    exact: ClassVar[bool] = True
    adapts: ClassVar[tuple[Kind, ...]] = ("linear",)

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of the tasks, in the order of their numbers."""
    task: str | None = None
    """The task of inputs without `task_ids`, and the one that `finalize` merges; by default none."""
    rank: int = Field(4, ge=1)
    """Rank of each skill, and of the adapter of each task."""
    skills: int = Field(4, ge=1)
    """Number of skills in each layer."""
    heads: int = Field(1, ge=1)
    """Parts of each layer's widths that mix the skills by weights of their own (MHR)."""

    @model_validator(mode="after")
    def _fit_together(self) -> Poly:
        if len(set(self.tasks)) < len(self.tasks) or not all(self.tasks):
            raise ValueError("tasks: each needs a name of its own")
        if self.task is not None and self.task not in self.tasks:
            raise ValueError(f"task: there is no {self.task!r} in tasks")
        return self

    def config(self, model: nn.Module, chosen: dict[str, nn.Module], targets: list[str] | str) -> Any:
        """peft's config for these layers. Raises for a width that the heads do not divide."""
        for name, layer in chosen.items():
            if any(width % self.heads for width in widths_of(layer)):
                raise EdgetuneError(
                    f"{name}: heads must divide the widths {widths_of(layer)}", got=self.heads,
                    action=f'change it, or add "{name}" to skip',
                )  # fmt: skip
        return require("peft", self.name).PolyConfig(
            r=self.rank, n_tasks=len(self.tasks), n_skills=self.skills, n_splits=self.heads, target_modules=targets
        )

    def prepare(self, model: nn.Module) -> None:
        """Let the routers take their task from the model's inputs."""
        hook = TaskIds(self.tasks, self.task)
        hook.put_on(model)
        for layer in poly_layers(model).values():
            layer.poly_router[ADAPTER].register_forward_pre_hook(hook.give, with_kwargs=True)
            layer.train(base_of(layer).training)

    def finalize(self, model: nn.Module) -> nn.Module:
        """Merge `task` into plain layers."""
        hook = hook_of(model, TaskIds)
        if hook is not None and poly_layers(model):
            if self.task is None:
                action = "set task, or write an adapter for each: et.split_tasks(model, folder)"
                raise EdgetuneError("a plain model computes one task", got=self.tasks, action=action)
            hook.choose(self.tasks.index(self.task))
        model = super().finalize(model)
        remove_hooks(model, TaskIds)
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save the adapter of each task as `folder/adapters/TASK`."""
        _save_tasks(model, self, folder / "adapters")


def poly_layers(model: nn.Module) -> dict[str, Any]:
    """peft's layers with skills, by name."""
    return {n: layer for n, layer in model.named_modules() if is_tuner(layer) and hasattr(layer, "poly_router")}


@torch.no_grad()
def task_factors(layer: Any, task: int) -> tuple[Tensor, Tensor]:
    """A `(rank, in)` and B `(out, rank)` of a task in a layer of peft's: what it adds is `x A^T B^T / rank`."""
    router, skills_a, skills_b = (part[ADAPTER] for part in (layer.poly_router, layer.poly_lora_A, layer.poly_lora_B))
    weights = router.module_logits[task].view(router.n_splits, router.n_skills).sigmoid()
    weights = weights / weights.sum(-1, keepdim=True)
    a = torch.einsum("hs,hsir->hir", weights, skills_a).flatten(0, 1)  # heads are parts of the input ...
    b = torch.einsum("hs,hsro->hor", weights, skills_b).flatten(0, 1)  # ... and of the output
    return a.T.contiguous(), b.contiguous()


def split_tasks(model: nn.Module, folder: str | Path) -> tuple[nn.Module, dict[str, Path]]:
    """Write the adapter of each task as a plain LoRA, `folder/TASK`, and finalize the base without them.

    Layers that were trained whole stay in the base. Returns the base and the folders, as `et.export(base, ...,
    adapters=folders)` takes them.
    """
    technique = next((t for t in active_techniques(model) if isinstance(t, Poly)), None)
    if technique is None:
        raise EdgetuneError("the model has no adapters with tasks", action="apply et.Poly, and split before finalizing")
    folders = _save_tasks(model, technique, Path(folder))
    for name, layer in poly_layers(model).items():
        replace(model, name, base_of(layer))
    return finalize(model), folders


def _save_tasks(model: nn.Module, technique: Poly, folder: Path) -> dict[str, Path]:
    layers, lora = poly_layers(model), require("peft", "poly").LoraConfig
    every = [name for name, _ in model.named_modules() if name]
    folders = {}
    for number, task in enumerate(technique.tasks):
        pairs = {name: task_factors(layer, number) for name, layer in layers.items()}
        state = {f"{PREFIX}{name}.lora_A.weight": a for name, (a, _) in pairs.items()}
        state |= {f"{PREFIX}{name}.lora_B.weight": b for name, (_, b) in pairs.items()}
        config = lora(r=technique.rank, lora_alpha=1, target_modules=exact_targets(every, list(layers)))
        folders[task] = write_adapter(model, config, state, folder / task)
    return folders
