"""Activations whose output is computed again in backward, so that what comes after them keeps nothing of its own.

GELU and SiLU keep their input. The product after them (`silu(gate) * up`) would keep the activation's output, and a
trained linear after that the product: both follow from the inputs, which are kept anyhow. So a `Source` notes how
the latest activation came about, and a product or a trained linear that is given that very tensor keeps the inputs.
In 8 bits a trained linear after an activation, a product or a norm keeps its input as int8 with a scale per row (off
by at most the row's peak / 254; after a norm, of the normalized rows, which the norm keeps anyhow).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from edgetune.lean import onednn
from edgetune.lean.activations import ACTIVATIONS, byte_derivative, times_derivative
from edgetune.lean.frozen_ops import linear as frozen_linear
from edgetune.lean.packing import autocast_dtype, from_rows, no_autocast, to_rows

OUTPUT, NORM, PRODUCT = "output", "norm", "product"  # kinds of sources besides the names of activations


class Source:
    """`output` is the activation `kind` of the first input, times the second where there are two.

    Without inputs: `OUTPUT`, a norm that keeps its output; `NORM`, one that keeps int8 rows; `PRODUCT`, in 8 bits.
    """

    def __init__(self, output: Tensor, kind: str, inputs: tuple[Tensor, ...]) -> None:
        self.output, self.kind, self.inputs = weakref.ref(output), kind, inputs
        self.versions = [t._version for t in (output, *inputs)]
        self.rows: tuple[
            Tensor | None, ...
        ] = ()  # steps, scale: `to_rows` of the output; or of a norm, with its parameters

    def made(self, x: Tensor) -> bool:
        """Whether it made this very tensor, and nothing was changed in place since."""
        return self.output() is x and self.versions == [t._version for t in (x, *self.inputs)]


class Latest:
    """The source of the latest activation; one at a time, so that it holds no memory for long."""

    def __init__(self, eight_bit: bool) -> None:
        self.eight_bit = eight_bit
        self.source: Source | None = None

    def note(self, output: Tensor, kind: str, *inputs: Tensor) -> Tensor:
        """Remember how `output` came about; returns it."""
        self.source = Source(output, kind, inputs)
        return output

    def note_norm(
        self, output: Tensor, parameters: tuple[Tensor | None, Tensor | None], rows: tuple[Tensor, ...]
    ) -> None:
        """Remember that `output` is these int8 rows times the norm's weight plus its bias."""
        self.source = Source(output, NORM, ())
        self.source.rows = (*rows, *parameters)

    def of(self, x: object) -> Source | None:
        """The source of `x`, if it is the latest output."""
        found = self.source
        return found if found is not None and isinstance(x, Tensor) and found.made(x) else None


class _Gated(torch.autograd.Function):
    """act(gate) * up; keeps gate and up. `y` is act(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, y: Tensor, kind: str) -> Tensor:  # type: ignore[override]
        ctx.kind = kind
        ctx.save_for_backward(gate, up)
        return y * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gate, up), found = ctx.saved_tensors, ACTIVATIONS[ctx.kind]
        for_gate = found.backward(gradient * up, gate) if ctx.needs_input_grad[0] else None
        for_up = (found.value(gate) * gradient).sum_to_size(up.shape) if ctx.needs_input_grad[1] else None
        return for_gate, for_up, None, None


class _ByteGated(torch.autograd.Function):
    """The same in three bytes an element: the derivative, act(gate) and up, the last two with a scale per row.

    `y` is act(gate), `steps` its derivative as `ByteDerivative` keeps it, in this order of the dimensions.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, gate: Tensor, up: Tensor, y: Tensor, kind: str, steps: Tensor, order: list[int]
    ) -> Tensor:
        ctx.kind, ctx.order = kind, order
        ctx.save_for_backward(steps, *to_rows(up), *to_rows(y))
        return y * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        steps, up, up_scale, y, y_scale = ctx.saved_tensors
        for_gate = from_rows(up, up_scale, gradient.dtype).mul_(gradient)
        for_gate = times_derivative(for_gate, steps, ACTIVATIONS[ctx.kind], ctx.order)
        return for_gate, from_rows(y, y_scale, gradient.dtype).mul_(gradient), None, None, None, None


class _LinearOf(torch.autograd.Function):
    """A linear whose input is computed again in backward, from `inputs` of the source. `x` is that input."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, *inputs: Tensor
    ) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(weight, *inputs)
        return onednn.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, *inputs = ctx.saved_tensors
        found, rows = ACTIVATIONS[ctx.kind], gradient.reshape(-1, gradient.shape[-1])
        with no_autocast(gradient.device):  # a backward inside autocast stays in the forward's dtype
            y = found.value(inputs[0])
            x = y if len(inputs) == 1 else y * inputs[1]
            for_weight = onednn.of_weight(rows, x)
            for_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
            del x
            back = onednn.of_input(rows, weight).view_as(inputs[0])
            if len(inputs) == 1:
                return None, for_weight, for_bias, None, found.backward(back, inputs[0])
            for_gate = found.backward(back * inputs[1], inputs[0]) if ctx.needs_input_grad[4] else None
            return None, for_weight, for_bias, None, for_gate, y.mul_(back) if ctx.needs_input_grad[5] else None


class _LinearOfRows(torch.autograd.Function):
    """A linear that keeps its input as int8 rows, or as the normalized rows and the parameters of a norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rows: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight, *rows)
        return onednn.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, steps, scale, *norm = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        with no_autocast(gradient.device):
            x = from_rows(steps, scale, weight.dtype).view(-1, weight.shape[1])
            for_weight = onednn.of_weight(rows, _scaled(x, *norm))
            for_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
            back = onednn.of_input(gradient, weight) if ctx.needs_input_grad[0] else None
        return back, for_weight, for_bias, *[None] * (len(norm) + 2)


def _scaled(rows: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    rows = rows if weight is None else rows.mul_(weight)
    return rows if bias is None else rows.add_(bias)


def activation(kind: str, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator `plain(input, inplace)` as one that notes its source, and in 8 bits keeps its derivative."""

    def operator(latest: Latest, input: Tensor, inplace: bool = False) -> Tensor:
        if not (input.requires_grad and input.is_floating_point()):
            return plain(input, inplace)
        y = byte_derivative(input, kind, inplace) if latest.eight_bit else plain(input, inplace)
        return y if inplace else latest.note(y, kind, input)

    return operator


def gelu(latest: Latest, input: Tensor, approximate: str = "none") -> Tensor:
    """`functional.gelu`."""
    kind = "gelu_tanh" if approximate == "tanh" else "gelu"
    return activation(kind, lambda x, _: functional.gelu(x, approximate=approximate))(latest, input)


def product(latest: Latest, input: Any, other: Any) -> Any:
    """`input * other`, with the output of the latest activation as one of them."""
    y, up = (input, other) if latest.of(input) else (other, input)
    source = latest.of(y)
    if source is None or len(source.inputs) != 1 or not isinstance(up, Tensor) or up is y:
        return input * other
    gate = source.inputs[0]
    fits = up.dtype == y.dtype == gate.dtype and torch.broadcast_shapes(up.shape, y.shape) == y.shape  # type: ignore[no-untyped-call]
    if not fits or not up.requires_grad:
        return input * other
    if hasattr(y.grad_fn, "order") and up.shape == y.shape:
        (steps,), order = y.grad_fn.saved_tensors, y.grad_fn.order
        found: Tensor = _ByteGated.apply(gate, up, y.detach(), source.kind, steps, order)  # type: ignore[no-untyped-call]
        return latest.note(found, PRODUCT)
    found = _Gated.apply(gate, up, y.detach(), source.kind)  # type: ignore[no-untyped-call]
    return latest.note(found, source.kind, gate, up) if up.shape == y.shape else found


def linear(latest: Latest, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`functional.linear`; after the latest activation a trained one keeps no input of its own."""
    source = latest.of(input)
    same = source is not None and all(t.dtype == weight.dtype for t in (input, *source.inputs))
    if (
        source is None
        or source.kind == OUTPUT
        or not same
        or not weight.requires_grad
        or weight.dim() != 2
        or autocast_dtype(input)
    ):
        return frozen_linear(input, weight, bias)
    if latest.eight_bit:
        source.rows = source.rows or to_rows(input.detach())
        return _LinearOfRows.apply(input, weight, bias, *source.rows)  # type: ignore[no-any-return,no-untyped-call]
    return _LinearOf.apply(input.detach(), weight, bias, source.kind, *source.inputs)  # type: ignore[no-any-return,no-untyped-call]


def kept_columns(latest: Latest | None, x: Tensor, columns: Tensor) -> tuple[str, tuple[Tensor | None, ...]]:
    """What to save for backward so that `columns_of` gives `x[..., columns]`: as little as is not kept anyhow.

    After an activation or a norm it is what that keeps itself; else, or in 8 bits, the columns (in 8 bits as rows).
    `latest` is that of the operators in whose reach this is called, if any.
    """
    source = latest.of(x) if latest is not None else None
    if source is None or latest is None or autocast_dtype(x):
        return "", (x.detach().index_select(-1, columns),)
    if source.kind == NORM:
        return NORM, source.rows
    if latest.eight_bit:
        return PRODUCT, to_rows(x.detach().index_select(-1, columns))
    return source.kind, source.inputs or (x,)


def columns_of(kind: str, saved: Sequence[Tensor | None], columns: Tensor, dtype: torch.dtype) -> Tensor:
    """The columns of `x`, of what `kept_columns` gave."""
    first, *others = saved
    assert first is not None
    if kind == PRODUCT:
        return from_rows(first, others[0], dtype)  # type: ignore[arg-type]
    if kind == NORM:
        rows = from_rows(first.index_select(-1, columns), others[0], dtype)  # type: ignore[arg-type]
        return _scaled(rows, *(None if t is None else t.index_select(0, columns) for t in others[1:]))
    if not kind:
        return first
    chosen = [t.index_select(-1, columns) for t in saved if t is not None]
    if kind == OUTPUT:
        return chosen[0]
    y = ACTIVATIONS[kind].value(chosen[0])
    return y if len(chosen) == 1 else y * chosen[1]
