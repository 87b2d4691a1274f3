"""Several adapters on one base as methods of one program: the base's weights are stored once, each method has its own
adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.adapt.low_rank import LowRank
from edgetune.capture.dynamic import Dynamic
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.floats import FloatType
from edgetune.core.inputs import Inputs, call, rows_of, tensors_of
from edgetune.core.modes import preserve_state
from edgetune.export.adapters import read_adapters
from edgetune.export.lower import check_finalized
from edgetune.export.methods import export_methods
from edgetune.export.pipeline import choose_target
from edgetune.export.side_paths import Factors, SidePaths, multiply_stored
from edgetune.program.artifact import Artifact
from edgetune.program.carried import Carried

BASE = "base"  # the method that computes it alone


class AdaptedMethod(nn.Module):
    """The base with one adapter: matrices of its own beside the layers that all methods share."""

    def __init__(self, base: nn.Module, factors: Factors, adapter: LowRank | None) -> None:
        super().__init__()
        self.base = base
        self.factors = factors
        own = {} if adapter is None else adapter.factors
        self.layers = tuple(own)
        self.stored = nn.ParameterList(
            nn.Parameter(tensor.contiguous(), requires_grad=False) for pair in own.values() for tensor in pair
        )

    @contextmanager
    def _holding(self) -> Iterator[None]:
        tensors = tuple(self.stored)
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        self.factors.update(zip(self.layers, pairs, strict=True))
        try:
            yield
        finally:
            self.factors.clear()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base returns with the adapter."""
        with self._holding():
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
    example = rows_of(example_inputs, 0, 1) if one_row else example_inputs
    checks = None if check_inputs is None else [row for rows in check_inputs for row in _rows(rows, one_row)]
    if checks is None and one_row:
        checks = [*_rows(example_inputs, one_row)]
    with paths.attached(model):
        methods = {BASE: AdaptedMethod(model, paths.factors, None)}
        methods |= {one.name: AdaptedMethod(model, paths.factors, one) for one in sides.adapters}
        with preserve_state(model), torch.no_grad():
            for method in methods.values():
                call(method, example)
        paths.check_used()
        return export_methods(
            {name: (method, example) for name, method in methods.items()},
            path,
            device=device,
            target=target,
            check_inputs=None if checks is None else dict.fromkeys(methods, checks),
            dynamic=None if dynamic is None else dict.fromkeys(methods, dynamic),
            external_data=external_data,
            io_in_plan=io_in_plan,
            max_relative_difference=max_relative_difference,
            carried=carried,
        )


def _rows(inputs: Inputs, one_row: bool) -> Iterator[Inputs]:
    """The inputs, or each of their rows."""
    first: Tensor = tensors_of(inputs)[0]
    for start in range(0, len(first) if one_row else 1):
        yield rows_of(inputs, start, start + 1) if one_row else inputs
