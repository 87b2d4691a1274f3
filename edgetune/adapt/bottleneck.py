"""Bottleneck adapters: a small network after a layer (Houlsby), or beside it (AdaptFormer).

Houlsby et al., 2019, arXiv:1902.00751, section 2.1: `y + up(act(down(y)))` on the output of a sublayer, before its
residual. Chen et al., 2022, arXiv:2205.13535, equations 3 and 4: `y + scale * up(relu(down(x)))` beside the MLP of a
block. The activation between the two products keeps them from merging into the layer: they stay, as plain layers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from edgetune.adapt.frozen_base import freeze_base, restore_base
from edgetune.adapt.widths import first_input, read_widths
from edgetune.core.carriers import float_type_of
from edgetune.core.errors import EdgetuneError
from edgetune.core.experts import select_adapted
from edgetune.core.inputs import device_of
from edgetune.core.layers import matches, replace
from edgetune.core.technique import Sample, Technique
from edgetune.core.traits import Trait
from edgetune.core.wrapped import keep_base_keys
from edgetune.lean.reads import refuse_read_elsewhere
from edgetune.lean.reads_in_source import outer_names

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class AdaptedModule(nn.Module):
    """A module `base`, and an `adapter` whose output is added to its own: of what it returns, or of what it takes."""

    adapter: Any  # down, activation, up

    def __init__(self, base: nn.Module, adapter: nn.Module, parallel: bool, scale: float = 1.0) -> None:
        super().__init__()
        self.base, self.adapter, self.parallel, self.scale = base, adapter, parallel, scale
        self.train(base.training)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output `(..., out)` plus the adapter's."""
        output: Tensor = self.base(*args, **kwargs)
        x = first_input(args, kwargs) if self.parallel else output
        added: Tensor = self.adapter(x.to(self.adapter.down.weight.dtype)).to(output.dtype)
        return output + (added if self.scale == 1 else self.scale * added)

    def extra_repr(self) -> str:
        """Where the adapter reads, and its scale."""
        return f"{'parallel' if self.parallel else 'serial'}, scale {self.scale:g}"


class Bottleneck(Technique):
    """Train a small down-activation-up network after, or beside, each of `targets`; the rest stays frozen.

    Layers that an earlier sparse-update chose train as well, such as a new classifier. `up` is zero at the start, so
    nothing changes. The adapters cannot be merged: they remain as two more linears `NAME.adapter.down` and `.up` after
    each module, which is then called `NAME.base`, and later steps quantize them like others. For targets that are no
    linears, such as the MLP of a block, example inputs are needed, from which the widths are read.
    """

    name: ClassVar[str] = "bottleneck"
    takes: ClassVar[Trait] = Trait.FROZEN | Trait.PACKED | Trait.LEAN
    leaves: ClassVar[Trait] = Trait.ADAPTED
    exact: ClassVar[bool] = True

    targets: tuple[str, ...]
    """Patterns of the modules that get an adapter: those that return one tensor `(..., width)`."""
    skip: tuple[str, ...] = ()
    """Patterns of modules to exclude from `targets`."""
    form: Literal["serial", "parallel"] = "serial"
    """Whether the adapter reads what the module returns (Houlsby) or what it takes (AdaptFormer)."""
    width: int = Field(16, ge=1)
    """Width between `down` and `up`."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """The function between `down` and `up`."""
    scale: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Factor of the adapter's output; AdaptFormer has 0.1."""

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Put the adapters in, in place."""
        chosen = select_adapted(
            model, self.targets, self.skip, self.name, accept=_has_parameters,
            instead='target "*.experts", the module of all of them',
        )  # fmt: skip
        for name, module in chosen.items():
            _refuse(model, name, module, chosen)
        refuse_read_elsewhere(model, chosen, sample)
        widths = read_widths(model, chosen, sample)
        freeze_base(model, self.name)
        for name, module in chosen.items():
            inside, outside = widths[name]
            adapter = self._adapter(outside if self.form == "serial" else inside, outside)
            layer = AdaptedModule(module, adapter.to(device_of(module)), self.form == "parallel", self.scale)
            keep_base_keys(layer)
            replace(model, name, layer)
        return model

    def finalize(self, model: nn.Module) -> nn.Module:
        """Fold the scale into `up`, in the type of the model. Tensors have the names of their modules from now on."""
        for name, layer in list(model.named_modules()):
            if isinstance(layer, AdaptedModule) and matches(name, self.targets):
                adapter = layer.adapter.to(float_type_of(layer.base))
                with torch.no_grad():
                    for parameter in adapter.up.parameters():
                        parameter.mul_(layer.scale)
                replace(model, name, AdaptedModule(layer.base, adapter, layer.parallel))
        restore_base(model, self.name)
        return model

    def rebuild(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """The adapters, with the widths that they have in `state`."""
        for name, module in list(model.named_modules()):
            down, up = (state.get(f"{name}.adapter.{part}.weight") for part in ("down", "up"))
            if down is not None and up is not None and matches(name, self.targets) and not matches(name, self.skip):
                adapter = self._adapter(down.shape[1], up.shape[0])
                replace(model, name, AdaptedModule(module, adapter, self.form == "parallel"))
        return model

    def _adapter(self, inside: int, outside: int) -> nn.Sequential:
        down, up = nn.Linear(inside, self.width), nn.Linear(self.width, outside)
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        return nn.Sequential(OrderedDict(down=down, activation=_ACTIVATIONS[self.activation](), up=up))


def _has_parameters(module: nn.Module) -> bool:
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and any(True for _ in module.parameters())


def _refuse(model: nn.Module, name: str, module: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    action = f'add "{name}" to skip'
    around = [model.get_submodule(outer) for outer in outer_names(name)]
    if any(isinstance(other, AdaptedModule) for other in (*module.modules(), *around)):
        raise EdgetuneError(f"{name} has a bottleneck already", got=type(module).__name__, action=action)
    outer = next((other for other in chosen if name.startswith(other + ".")), None)
    if outer is not None:
        raise EdgetuneError(f"{name} is inside {outer}, which is a target too", got=name, action=action)
