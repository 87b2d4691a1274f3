"""Sparse backpropagation: only some layers train, and backward stops at the last layer that needs one.

The idea of updating few layers, biases first, to save activation memory is that of TinyTL (Cai et al., 2020,
arXiv:2007.11622) and of sparse update (Lin et al., 2022, arXiv:2206.15472).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import field_validator
from torch import nn

from edgetune import trainable
from edgetune.sparse import head
from edgetune.sparse.frozen import KEEPING, FrozenLayer, FrozenStage, remove_hooks
from edgetune.sparse.light.operators import Activations, LightOperators
from edgetune.sparse.scheme import Scheme, Slice, WrittenPart, blocks_of, resolve, trains
from edgetune.sparse.sliced import Sliced, strongest
from edgetune.targets import refuse_read_directly, replace
from edgetune.technique import EdgetuneError, Sample, Technique
from edgetune.wrapped import is_peft, merge


class SparseUpdate(Technique):
    """Train only the layers of `scheme`; the frozen ones before them run without a graph and without dropout.

    `scheme`: `last-2` (any number) is the last blocks and what stands between them, `bias` all biases,
    `bert-pockengine` biases of the last half of the blocks and weights of the last third; or patterns written out,
    `{"encoder.layer.5": "full", "*.query": "bias", "*.intermediate.dense": 0.25}`, where a later pattern wins, a
    pattern covers all inside the layers it names, and what no pattern names is frozen. A number is the part of a
    weight's input channels that trains, those of largest magnitude; see `Slice` for other ways to choose.
    `head`: everything after the last block. `norms`: whether normalizations in the layers of the scheme train.
    """

    name: ClassVar[str] = "sparse-update"
    after: ClassVar[frozenset[str]] = frozenset({"lora", "nf4", "prune", "sparse-update"})
    exact: ClassVar[bool] = True

    scheme: str | dict[str, WrittenPart] = "last-2"
    head: Literal["full", "bias", "frozen"] = "full"
    norms: bool = True
    activations: Activations = "exact"

    @field_validator("scheme")
    @classmethod
    def _not_empty(cls, scheme: str | dict[str, WrittenPart]) -> str | dict[str, WrittenPart]:
        if not scheme:
            raise ValueError('an empty scheme; write "last-2", "bias" or patterns')
        return scheme

    def resolve(self, model: nn.Module) -> Scheme:
        """What this would train in `model`, as a value to print. Changes nothing."""
        return resolve(model, self.scheme, self.head, self.norms)

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Set what trains, in place, and put hooks on the frozen stages and layers."""
        if any(is_peft(module) for module in model.modules()):
            raise EdgetuneError("sparse-update would freeze the adapters", action="put sparse-update before lora")
        scheme = self.resolve(model)
        slices = {c.layer: c.part for c in scheme.choices if isinstance(c.part, Slice)}
        refuse_read_directly(model, slices)
        chosen = {name: strongest(model.get_submodule(name), part.ratio, part.of) for name, part in slices.items()}
        trainable.remember(model, self.name)
        for choice in scheme.choices:
            layer = model.get_submodule(choice.layer)
            for key, parameter in layer._parameters.items():
                if parameter is not None:
                    parameter.requires_grad_(trains(choice.part, key))
            if choice.part in ("bias", "frozen") and isinstance(layer, KEEPING):
                FrozenLayer().put_on(layer)
        for name, (indices, dim) in chosen.items():
            replace(model, name, Sliced(model.get_submodule(name), indices, dim))
        for stage in stages_of(model):
            FrozenStage().put_on(stage)
        LightOperators(self.activations).put_on(model)
        head.put_on(model)
        return model

    def finalize(self, model: nn.Module) -> nn.Module:
        """Take the hooks off and the slices in; what trained before `apply` trains again."""
        remove_hooks(model)
        head.take_off(model)
        model = merge(model, lambda layer: isinstance(layer, Sliced))
        trainable.recall(model, self.name)
        return model


def stages_of(model: nn.Module) -> list[nn.Module]:
    """The pieces that run one after the other: the blocks, and the outermost modules around them.

    Where there are no blocks: the outermost modules that do not train only in part. A module without parameters is a
    stage only before the last block, where nothing but noise could come from it; after it, dropout serves the head.
    """
    blocks = set(blocks_of(model))
    ancestors = {outer for name in blocks for outer in _outer(name)}
    found: list[nn.Module] = []
    remaining = len(blocks)

    def walk(name: str, module: nn.Module) -> None:
        nonlocal remaining
        remaining -= name in blocks
        if name in blocks or (name and not _descend(name, module, ancestors)):
            if remaining or name in blocks or any(True for _ in module.parameters()):
                found.append(module)
            return
        for key, child in module.named_children():
            walk(f"{name}.{key}".lstrip("."), child)

    walk("", model)
    return found


def _outer(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _descend(name: str, module: nn.Module, ancestors: set[str]) -> bool:
    if name in ancestors or isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return any(True for _ in module.children())
    return not ancestors and len({p.requires_grad for p in module.parameters()}) > 1
