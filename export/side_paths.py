"""Low-rank side paths beside the layers of a program. A forward hook adds them: no layer changes its name or class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgetune.capture.positional import Positional
from edgetune.core.errors import EdgetuneError, Exit, truncate_list
from edgetune.core.inputs import Inputs

_CHILD = "side"  # of an adapted layer
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def multiply_given(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`x A B` with A `(1, in, rank)` and B `(1, rank, out)` that come with the call.

    Whatever the batch of `x`, its rows become one batch of `bmm`, which multiplies two computed operands.
    """
    rows = x.reshape(1, -1, x.shape[-1])
    product = torch.bmm(torch.bmm(rows, a.to(x.dtype)), b.to(x.dtype))
    return product.reshape(*x.shape[:-1], b.shape[-1])


def multiply_stored(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`x A^T B^T` with A `(rank, in)` and B `(out, rank)` as the weights of two linear layers."""
    return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))


class Factors(dict[str, tuple[Tensor, Tensor]]):
    """A and B of each layer during one call.

    Copies of a program share it: the side paths of its layers read what its forward put there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used: set[str] = set()  # layers that were called with a side path

    def __deepcopy__(self, memo: Any) -> Factors:
        return self


class SidePath(nn.Module):
    """What a layer adds to its output; a module, because backends convert all that a linear layer contains as one."""

    def __init__(self, name: str, factors: Factors, product: Product) -> None:
        super().__init__()
        self.name = name
        self.factors = factors
        self.product = product

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """The output of the layer with that of the side path; without factors, as it is."""
        if self.name not in self.factors:
            return output
        self.factors.used.add(self.name)
        return output + self.product(x, *self.factors[self.name])


@dataclass(frozen=True)
class SidePaths:
    """The side paths of a program: which layers have one, and how it is computed."""

    layers: tuple[str, ...]
    product: Product
    factors: Factors = field(default_factory=Factors)

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Inside, the layers of `model`, and those of its copies, add their side path while `holding` gives one."""
        layers = {name: model.get_submodule(name) for name in self.layers}
        handles = [layer.register_forward_hook(_add_side_path) for layer in layers.values()]
        for name, layer in layers.items():
            layer.add_module(_CHILD, SidePath(name, self.factors, self.product))
        try:
            yield
        finally:
            for layer, handle in zip(layers.values(), handles, strict=True):
                handle.remove()
                delattr(layer, _CHILD)

    @contextmanager
    def holding(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Inside, A and B of each layer in turn are those in `tensors`; none: the base computes alone."""
        if tensors:
            pairs = zip(tensors[::2], tensors[1::2], strict=True)
            self.factors.update(zip(self.layers, pairs, strict=True))
        try:
            yield
        finally:
            self.factors.clear()

    def check_used(self) -> None:
        """Raise for a layer that a run of the model did not call: its adapter would have no effect."""
        unused = [name for name in self.layers if name not in self.factors.used]
        if unused:
            raise EdgetuneError(
                f"{truncate_list(unused, 4)}: the model does not call this layer, like attention that reads the weight "
                "of its out_proj, so a side path would have no effect",
                got=unused[0],
                action="merge the adapter instead, or train one without this layer",
                exit_code=Exit.EXPORT,
            )


def _add_side_path(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    added: Tensor = getattr(layer, _CHILD)(args[0], output)
    return added


class AdaptedProgram(Positional):
    """A program with side paths, whose matrices are its last inputs, or its own parameters."""

    def __init__(self, model: nn.Module, inputs: Inputs, paths: SidePaths, stored: Sequence[Tensor]) -> None:
        super().__init__(model, inputs)
        self.paths = paths
        self.stored = nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in stored)

    def named_outputs(self, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The outputs by the names that a manifest gives them."""
        own = len(tensors) - (0 if len(self.stored) else 2 * len(self.paths.layers))
        with self.paths.holding(tensors[own:] or tuple(self.stored)):
            return super().named_outputs(tensors[:own])

    def store(self, tensors: Sequence[Tensor]) -> None:
        """Put other values into its own matrices; none, if they are inputs."""
        for parameter, tensor in zip(self.stored, tensors, strict=True):
            parameter.data = tensor
