"""The five supports of GLoRA: their forms as a value, and a linear that has them.

Chavan et al., 2023, arXiv:2306.07967: its unified formulation and weight-entangled supernet.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from edgetune.core.inputs import device_of
from edgetune.core.technique import Settings
from edgetune.core.wrapped import Wrapped


class SupportPath(Settings):
    """The form of each of a layer's five supports: one path through the supernet."""

    A: Literal["low-rank", "vector", "scalar", "none"] = "low-rank"
    """Scales the weight, by element (`low-rank`), by output (`vector`) or as a whole."""
    B: Literal["low-rank", "vector", "scalar", "none"] = "low-rank"
    """Is added to the weight."""
    C: Literal["low-rank", "vector", "none"] = "low-rank"
    """An input that is always there: the weight times it is added to the bias."""
    D: Literal["vector", "scalar", "none"] = "vector"
    """Scales the bias."""
    E: Literal["vector", "scalar", "none"] = "vector"
    """Is added to the bias."""
    rank: int = Field(4, ge=1)
    """Rank of the low-rank ones."""

    def sizes(self, outputs: int, inputs: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that these forms have in a layer, by name: `A_down` `(out, rank)`, `E` `(out,)`."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, rows, columns in (("A", outputs, inputs), ("B", outputs, inputs), ("C", inputs, 1)):
            form = getattr(self, name)
            if form == "low-rank":
                shapes |= {f"{name}_down": (rows, self.rank), f"{name}_up": (self.rank, columns)}
            elif form != "none":
                shapes[f"{name}_down"] = (rows, 1) if form == "vector" else (1, 1)
        for name in ("D", "E") if bias else ("E",):
            form = getattr(self, name)
            if form != "none":
                shapes[name] = (outputs,) if form == "vector" else (1,)
        return shapes

    def __str__(self) -> str:
        chosen = [f"{name} {getattr(self, name)}" for name in FORMS if getattr(self, name) != "none"]
        low = any(getattr(self, name) == "low-rank" for name in FORMS)
        return ", ".join(chosen + ([f"rank {self.rank}"] if low else [])) or "nothing"


FORMS: dict[str, tuple[str, ...]] = {name: get_args(SupportPath.model_fields[name].annotation) for name in "ABCDE"}


def ranks_of(rank: int) -> list[int]:
    """The ranks of a supernet's paths: the whole, a half, a quarter."""
    return sorted({max(1, rank // part) for part in (1, 2, 4)})


def draw_path(rank: int) -> SupportPath:
    """A path with every form and rank equally likely, by torch's generator."""
    options: dict[str, Any] = {**FORMS, "rank": ranks_of(rank)}
    draws = torch.randint(2**31, (len(options),)).tolist()
    return SupportPath(**{name: of[draw % len(of)] for draw, (name, of) in zip(draws, options.items(), strict=True)})


class GLoRALinear(Wrapped):
    """A linear with the supports of `path`, zero at the start.

    In a supernet these are the largest ones, held once, and every smaller one is a slice of them: in training mode each
    forward takes those of a random path. The first forwards take all, until there was an update, so that every tensor
    gets a gradient.
    """

    def __init__(self, base: nn.Module, path: SupportPath, supernet: bool) -> None:
        super().__init__(base)
        self.path, self.supernet = path, supernet
        self.searched_loss = math.nan  # of the path, if it was searched
        for name, shape in self.sizes(path).items():
            parameter = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device_of(base)))
            if name.endswith("_up"):
                nn.init.xavier_uniform_(parameter)
            self.register_parameter(name, parameter)
        self.train(base.training)

    def sizes(self, path: SupportPath) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that the supports of a path have here, by name."""
        linear: Any = self.base
        return path.sizes(linear.out_features, linear.in_features, linear.bias is not None)

    def settle(self, path: SupportPath) -> None:
        """Leave the supernet: keep the slices of one path."""
        shapes = self.sizes(path)
        for name, parameter in list(self._parameters.items()):
            if name not in shapes:
                delattr(self, name)
            elif parameter is not None:
                setattr(self, name, nn.Parameter(parameter.detach()[tuple(map(slice, shapes[name]))].clone()))
        self.path, self.supernet = path, False

    def support(self, name: str, path: SupportPath) -> Tensor | None:
        """One support in the form that the path gives it: `(out, in)` or what broadcasts to it; `(in, 1)`; `(out,)`."""
        form = getattr(path, name)
        down: Tensor | None = getattr(self, name if name in "DE" else f"{name}_down", None)
        if form == "none" or down is None:
            return None
        if name in "DE":
            return down if form == "vector" else down[:1]
        if form == "low-rank":
            up: Tensor = getattr(self, f"{name}_up")
            return down[:, : path.rank] @ up[: path.rank]
        return down[:, :1] if form == "vector" else down[:1, :1]

    def tensors(self, path: SupportPath) -> dict[str, Tensor]:
        """Weight and bias of the linear that computes the same by this path."""
        plain = super().plain_tensors()
        weight, bias = plain["weight"], plain.get("bias")
        a, b, c, d, e = (self.support(name, path) for name in FORMS)
        dense = weight if a is None else weight * (1 + a)
        dense = dense if b is None else dense + b
        moved = bias if bias is None or d is None else bias * (1 + d)
        constant = None if c is None else (weight @ c.to(weight.dtype)).squeeze(1)
        added = [term.expand(len(weight)) for term in (moved, e, constant) if term is not None]
        tensors = {"weight": dense.to(weight.dtype)}
        return {**tensors, "bias": sum(added[1:], added[0]).to(weight.dtype)} if added else tensors

    def plain_tensors(self) -> dict[str, Tensor]:
        """By the layer's path; in a supernet, the one with all supports."""
        return self.tensors(self.path)

    def forward(self, x: Tensor) -> Tensor:
        """What the linear with the moved weight and bias computes."""
        draws = self.supernet and self.training and bool(self.E.any())  # type: ignore[operator, union-attr]
        return functional.linear(x, **self.tensors(draw_path(self.path.rank) if draws else self.path))

    def extra_repr(self) -> str:
        """The path."""
        return f"{'supernet of ' if self.supernet else ''}{self.path}"
