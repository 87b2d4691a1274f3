"""Shapes as functions of a batch's rows and tokens, and rows cut out of such tensors and put back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from edgetune.core.errors import EdgetuneError

Size = int | Literal["rows", "tokens"]


@dataclass(frozen=True)
class Form:
    """The shape of a tensor for any batch, and its type."""

    sizes: tuple[Size, ...]
    dtype: torch.dtype

    def shape(self, rows: int, tokens: int) -> tuple[int, ...]:
        """The shape for this many rows, padded to this many tokens."""
        return tuple(rows if size == "rows" else tokens if size == "tokens" else size for size in self.sizes)

    @property
    def has_rows(self) -> bool:
        """Whether the tensor has a value for each row."""
        return "rows" in self.sizes

    def values(self, length: int) -> int:
        """Number of values of one row of `length` tokens."""
        return math.prod(self.shape(1, length))

    def row(self, tensor: Tensor, row: int, length: int) -> Tensor:
        """A view of one row without its padding."""
        axis = self.sizes.index("rows")
        values = tensor.select(axis, row)
        for place, size in enumerate(s for n, s in enumerate(self.sizes) if n != axis):
            if size == "tokens":
                values = values.narrow(place, 0, length)
        return values

    def row_shape(self, length: int) -> tuple[int, ...]:
        """The shape of one row without its padding."""
        axis = self.sizes.index("rows")
        shape = self.shape(1, length)
        return shape[:axis] + shape[axis + 1 :]


@dataclass(frozen=True)
class Widths:
    """The widths of the inputs of the short and of the long probe; equal if rows have no tokens."""

    short: int
    long: int


def form_of(subject: str, one: Tensor, two: Tensor, longer: Tensor, widths: Widths) -> Form:
    """The form of a tensor that was seen for one row, for two rows and for one longer row."""
    if not one.dim() == two.dim() == longer.dim():
        raise EdgetuneError(f"cache_prefix: {subject} changes its number of dimensions with the batch")
    sizes: list[Size] = []
    for a, b, c in zip(one.shape, two.shape, longer.shape, strict=True):
        if a == b == c:
            sizes.append(a)
        elif (a, b, c) == (1, 2, 1) and "rows" not in sizes:
            sizes.append("rows")
        elif (a, b, c) == (widths.short, widths.short, widths.long):
            sizes.append("tokens")
        else:
            raise EdgetuneError(
                f"cache_prefix: how {subject} depends on the rows is unclear: {tuple(one.shape)} for one row, "
                f"{tuple(two.shape)} for two, {tuple(longer.shape)} for a longer one",
                action="leave cache_prefix out for this model",
            )
    return Form(tuple(sizes), one.dtype)


def widths_of(one: Sequence[Tensor], longer: Sequence[Tensor]) -> Widths:
    """The widths of the inputs of a short and a long row: the only size that may differ between them."""
    widths = {
        (a, b)
        for short, long in zip(one, longer, strict=True)
        for a, b in zip(short.shape, long.shape, strict=True)
        if a != b
    }
    if len(widths) > 1:
        raise EdgetuneError("cache_prefix: the inputs differ in more than one size", got=sorted(widths))
    return Widths(*next(iter(widths))) if widths else Widths(0, 0)


def template_of(subject: str, one: Any, two: Any, longer: Any, widths: Widths) -> Any:
    """The outputs of a stage, with a `Form` in place of each tensor."""
    others = list(zip(tree_leaves(two), tree_leaves(longer), strict=True))
    if len(others) != len(tree_leaves(one)):
        raise EdgetuneError(f"cache_prefix: {subject} changes its structure with the batch")
    rest = iter(others)

    def form(value: Any) -> Any:
        b, c = next(rest)
        if isinstance(value, Tensor):
            return form_of(subject, value, b, c, widths)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise EdgetuneError(
            f"cache_prefix: {subject} contains values that cannot be stored",
            got=type(value).__name__,
            action="leave cache_prefix out for this model",
        )

    return tree_map(form, one)


def forms_in(template: Any) -> list[Form]:
    """The forms of a template, in order."""
    return [value for value in tree_leaves(template) if isinstance(value, Form)]


def fill_template(template: Any, tensors: Sequence[Tensor]) -> Any:
    """The template with tensors in place of its forms."""
    rest = iter(tensors)
    return tree_map(lambda value: next(rest) if isinstance(value, Form) else value, template)


def blank_template(template: Any, rows: int, tokens: int, device: torch.device, whole: bool) -> Any:
    """The template with tensors that must not be read: NaN, or zero for integers.

    They take the memory of one value, or with `whole` all of it, for code that writes into them.
    """

    def stand_in(value: Any) -> Any:
        if not isinstance(value, Form):
            return value
        blank = float("nan") if value.dtype.is_floating_point or value.dtype.is_complex else 0
        shape = value.shape(rows, tokens)
        if whole:
            return torch.full(shape, blank, dtype=value.dtype, device=device)
        return torch.full((), blank, dtype=value.dtype, device=device).expand(shape)

    return tree_map(stand_in, template)


def stored_type(dtype: torch.dtype, setting: str) -> torch.dtype:
    """The dtype to store such values in: `fp32` keeps every bit, `fp16` halves floats wider than 16 bits."""
    wide = dtype in (torch.float32, torch.float64)
    return torch.float16 if setting == "fp16" and wide else dtype


def bytes_of(tensor: Tensor) -> bytes:
    """The values of a CPU tensor as bytes, in order."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def tensor_of(data: bytearray, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The inverse of `bytes_of`."""
    return torch.frombuffer(data, dtype=dtype).view(*shape) if data else torch.empty(*shape, dtype=dtype)


def digest_of(values: Sequence[Tensor]) -> bytes:
    """A digest of CPU tensors, 16 bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(bytes_of(value))
    return digest.digest()


def name_arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str | int, Any]:
    """A model's arguments, by name or by position."""
    arguments: dict[str | int, Any] = dict(enumerate(args))
    arguments.update(kwargs)
    return arguments


def relative_error(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of `a`; NaN if only `b` contains NaN."""
    same = a == b
    if bool(same.all()):
        return 0.0
    a, b = a.double(), b.double()
    scale = a[a.isfinite()].abs().max() if bool(a.isfinite().any()) else a.new_tensor(1.0)
    return float((a - b).abs().masked_fill(same, 0.0).max() / scale.clamp(min=1e-12))
