"""A statically quantized graph computed in whole numbers, as XNNPACK does."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

_ATEN = torch.ops.aten
LAYERS = (_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv_transpose2d.input, _ATEN.linear.default)
_RELUS = frozenset({_ATEN.relu.default, _ATEN.relu_.default})
CLAMPS = _RELUS | {_ATEN.hardtanh.default, _ATEN.hardtanh_.default}
_BITS = 20  # of the larger factor of an addition


class Integers(fx.Interpreter):
    """Runs a graph of dequantize, operator, clamp and quantize with whole numbers where XNNPACK has them.

    Run as written, the graph keeps its biases in floating point where XNNPACK rounds them to the step of the
    sum, and scales before it adds or multiplies. That moves one value in a thousand to the next of its 256 steps,
    later layers enlarge it, and in EfficientNet-Lite0 a third of all values had moved after five blocks. The sums
    here are exact while they stay below 2^24, in single precision. What XNNPACK computes in floating point between
    two quantized operators (hard swish, sigmoid, softmax, layer norm) stays so, in the form that a program has it in:
    what differs in the last bit of a float goes to another step once in some ten thousand values.
    """

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node; of a quantized operator, multiples of the scale that the next node rounds to."""
        rule = _RULES.get(n.target)
        value = self._in_program_form(n) if rule is None else rule(self, n)
        return super().run_node(n) if value is None else value

    def _in_program_form(self, n: fx.Node) -> Tensor | None:
        """A sum, a norm or an attention as the export writes it; `None` for other operators."""
        form = _forms().get(n.target)
        if form is None:
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        value: Tensor | None = form(*args, **kwargs)
        return None if value is NotImplemented else value

    def layer(self, n: fx.Node) -> Tensor | None:
        """A sum of products and a rounded bias, scaled once."""
        source, weight, output = n.args[0], n.args[1], _consumer(n, CLAMPS)
        if not (is_operator(source, "dequantize") and is_operator(weight, "dequantize")):
            return None  # one that was left in floating point
        if not is_operator(output, "quantize"):
            return None
        args, _ = self.fetch_args_kwargs_from_env(n)
        integers, weight_scale = (self._constant(argument) for argument in weight.args[:2])
        scale: Any = source.args[1]
        step: Any = weight_scale * scale  # of the sum: one, or one for each output channel
        along = (-1,) if n.target is _ATEN.linear.default else (-1, *[1] * (args[0].dim() - 2))
        total: Tensor = n.target(self._integers(source), integers.float(), None, *args[3:])  # type: ignore[operator]
        if len(args) > 2 and args[2] is not None:
            total = total + (args[2] * (1.0 / step)).round().view(along)
        ratio = torch.as_tensor(step, dtype=torch.float32) / _scale(output)
        return (total * ratio.view(along)).round() * _scale(output)

    def addition(self, n: fx.Node) -> Tensor | None:
        """Both sides times integer factors, of which the larger has 21 bits; halves round up."""
        output = self._elementwise(n, _RELUS)
        if output is None or n.kwargs.get("alpha", 1) != 1:
            return None
        ratios = [float(_scale(source) / _scale(output)) for source in n.args]
        shift = _BITS + 1 - math.frexp(max(ratios))[1]
        if not 12 <= shift <= 30 or min(ratios) < 2**-10:  # what XNNPACK's kernel is written for
            return None
        factors = [round(math.ldexp(ratio, shift)) for ratio in ratios]
        left, right = (self._integers(source).int() * factor for source, factor in zip(n.args, factors))  # noqa: B905
        return ((left + right + (1 << (shift - 1))) >> shift) * _scale(output)

    def product(self, n: fx.Node) -> Tensor | None:
        """A whole product, scaled once."""
        output = self._elementwise(n, frozenset())
        if output is None:
            return None
        left, right = n.args
        ratio = _scale(left) * _scale(right) / _scale(output)
        return (self._integers(left) * self._integers(right) * ratio).round() * _scale(output)

    def mean(self, n: fx.Node) -> Tensor | None:
        """A mean over an image. Its exact halves go to the even neighbour, the zero point counted in.

        In floating point, chance decides where they go, and of a mean over four numbers every fourth is a half.
        """
        source, output = n.args[0], _consumer(n, frozenset())
        if not (is_operator(source, "dequantize") and is_operator(output, "quantize")):
            return self._in_program_form(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if not _is_pooling(n.target, args):
            return self._in_program_form(n)
        mean: Tensor = n.target(self._integers(source), *args[1:], **kwargs)  # type: ignore[operator]
        zero: Any = output.args[2]
        rescaled: Tensor = ((mean * (_scale(source) / _scale(output)) + zero).round() - zero) * _scale(output)
        return rescaled

    def resize(self, n: fx.Node) -> Tensor | None:
        """Bilinear resizing of an image: along the rows, then between them, in single precision.

        Where each place is a mean of whole numbers, as after a doubling, many values are halves.
        """
        args, _ = self.fetch_args_kwargs_from_env(n)
        x, size, aligned = args[:3]
        if x.dim() != 4 or x.dtype != torch.float32:
            return None
        if size is None:
            size = [int(had * factor) for had, factor in zip(x.shape[2:], args[3])]  # noqa: B905
        (top, bottom, down), (left, right, across) = (
            _between(had, wanted, aligned) for had, wanted in zip(x.shape[2:], size)  # noqa: B905
        )  # fmt: skip
        above, below = x[:, :, top], x[:, :, bottom]
        above, below = (row[..., left] + (row[..., right] - row[..., left]) * across for row in (above, below))
        resized: Tensor = above + (below - above) * down[:, None]
        return resized

    def _elementwise(self, n: fx.Node, clamps: frozenset[Any]) -> fx.Node | None:
        """The node that rounds the result, if both sides are quantized as well."""
        output = _consumer(n, clamps)
        sides = len(n.args) == 2 and all(is_operator(source, "dequantize") for source in n.args)
        return output if sides and is_operator(output, "quantize") else None

    def _integers(self, source: Any) -> Tensor:
        """The integers that were dequantized, minus the zero point."""
        value: Tensor = self.env[source]
        return (value / _scale(source)).round()

    def _constant(self, argument: Any) -> Any:
        """A constant of the graph: a tensor that the module holds, or a number."""
        return self.fetch_attr(str(argument.target)) if isinstance(argument, fx.Node) else argument


_RULES: dict[Any, Callable[[Integers, fx.Node], Tensor | None]] = {
    **dict.fromkeys(LAYERS, Integers.layer),
    **dict.fromkeys((_ATEN.add.Tensor, _ATEN.add_.Tensor), Integers.addition),
    **dict.fromkeys((_ATEN.mul.Tensor, _ATEN.mul_.Tensor), Integers.product),
    **dict.fromkeys((_ATEN.adaptive_avg_pool2d.default, _ATEN.mean.dim), Integers.mean),
    _ATEN.upsample_bilinear2d.vec: Integers.resize,
}


@cache
def _forms() -> dict[Any, Callable[..., Any]]:
    """The operators that the export writes in other ones, whose results differ in the last bit."""
    from edgetune.capture.repairs import activations, attention, gelu, mean, norms, power

    forms: dict[Any, Callable[..., Any]] = {}
    for repair in (activations, attention, gelu, mean, norms, power):
        forms.update(repair.REPAIRS)
    return forms


def _between(had: int, wanted: int, aligned: bool) -> tuple[Tensor, Tensor, Tensor]:
    """For each of the `wanted` places of a dim the two of the `had` that it lies between, and how far along."""
    less = int(aligned and wanted != 1)
    step = torch.tensor(float(had - less)) / float(wanted - less)
    places = torch.arange(wanted, dtype=torch.float32) * step
    if not aligned:
        places = (places + (step * 0.5 - 0.5)).clamp(0.0, had - 1.0)
    first = places.long()
    return first, (first + 1).clamp(max=had - 1), places - first


def _scale(node: Any) -> Tensor:
    """The scale of a quantize or dequantize node, in single precision."""
    return torch.tensor(node.args[1], dtype=torch.float32)


def _is_pooling(target: Any, args: tuple[Any, ...]) -> bool:
    """Whether a mean is one that XNNPACK takes between two roundings: over a whole image, whose dims it keeps."""
    if args[0].dim() != 4 or not args[1]:
        return False
    if target is _ATEN.adaptive_avg_pool2d.default:
        return all(size == 1 for size in args[1])
    return sorted(dim % 4 for dim in args[1]) == [2, 3] and len(args) > 2 and bool(args[2])


def _consumer(node: fx.Node, clamps: frozenset[Any]) -> fx.Node | None:
    """The one node that reads this one, or the clamp after it."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in clamps:
        users = list(users[0].users)
    return users[0] if len(users) == 1 else None


def is_operator(node: object, operator: str) -> TypeGuard[fx.Node]:
    """Whether a node is one of the quantizing operators whose names begin so: `quantize`, `dequantize`."""
    return isinstance(node, fx.Node) and str(node.target).startswith(f"quantized_decomposed.{operator}")
