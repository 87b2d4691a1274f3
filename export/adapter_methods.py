"""Several adapters on one base as methods of one program: the base's weights are stored once, each method has its own
adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgetune.adapt.low_rank import LowRank
from edgetune.capture.dynamic import Dynamic
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.floats import FloatType
from edgetune.core.inputs import Inputs, call
from edgetune.core.modes import preserve_state
from edgetune.export.adapters import read_adapters
from edgetune.export.lower import check_finalized
from edgetune.export.methods import export_methods
from edgetune.export.pipeline import choose_target
from edgetune.export.side_paths import SidePaths, multiply_stored
from edgetune.program.artifact import Artifact
from edgetune.program.carried import Carried

BASE = "base"  # the method that computes it alone


class AdaptedMethod(nn.Module):
    """The base with one adapter: matrices of its own beside the layers that all methods share."""

    def __init__(self, base: nn.Module, paths: SidePaths, adapter: LowRank | None) -> None:
        super().__init__()
        self.base = base
        own = {} if adapter is None else adapter.factors
        self.paths = replace(paths, layers=tuple(own))
        self.stored = nn.ParameterList(
            nn.Parameter(tensor.contiguous(), requires_grad=False) for pair in own.values() for tensor in pair
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base returns with the adapter."""
        with self.paths.holding(tuple(self.stored)):
            return self.base(*args, **kwargs)


def export_adapters_as_methods(
    model: nn.Module,
    example_inputs: Inputs,
    path: Path,
    adapters: Mapping[str, str | Path],
    *,
    adapter_rank: int | None,
    device: str | None,
    target: str | None,
    dtype: FloatType,
    check_inputs: Sequence[Inputs] | None,
    one_row: bool,
    dynamic: Dynamic | None,
    external_data: bool,
    io_in_plan: bool,
    max_relative_difference: float | None,
    carried: Carried | None,
) -> Artifact:
    """Lower the base as the method `base`, and with each adapter as the method of its name. See `et.export`."""
    if dtype != "fp32":
        action = "leave dtype out, or export with form='inputs'"
        raise EdgetuneError("adapters as methods compute in fp32", got=dtype, action=action, exit_code=Exit.USAGE)
    if BASE in adapters:
        action = "choose another name"
        raise EdgetuneError(f"the method {BASE} is the model without an adapter", got=BASE, action=action)
    sides = read_adapters(adapters, "methods", adapter_rank, model, choose_target(path, device, target), dtype)
    assert sides is not None
    check_finalized(model)
    paths = SidePaths(tuple(layer.name for layer in sides.layers), multiply_stored)
    with paths.attached(model):
        methods = {BASE: AdaptedMethod(model, paths, None)}
        methods |= {one.name: AdaptedMethod(model, paths, one) for one in sides.adapters}
        with preserve_state(model), torch.no_grad():
            for method in methods.values():
                call(method, example_inputs)
        paths.check_used()
        return export_methods(
            {name: (method, example_inputs) for name, method in methods.items()},
            path,
            device=device,
            target=target,
            check_inputs=None if check_inputs is None else dict.fromkeys(methods, check_inputs),
            dynamic=None if dynamic is None else dict.fromkeys(methods, dynamic),
            external_data=external_data,
            io_in_plan=io_in_plan,
            one_row=one_row,
            max_relative_difference=max_relative_difference,
            carried=carried,
        )
