"""Complex numbers as pairs of real ones, for which the runtime has almost no kernels, as in rotary embeddings.

A complex tensor becomes a real one with a last dim of two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from edgetune.capture.operators import constants_of
from edgetune.capture.repairs.shapes import add_node, is_fixed

_ATEN = torch.ops.aten
Pairs = dict[fx.Node, fx.Node]


def write_as_pairs(program: ExportedProgram) -> None:
    """Write every complex tensor of the captured program as pairs, if all their operators are supported."""
    nodes = [node for node in program.graph.nodes if _touches(node)]
    if not nodes or not all(_is_supported(node, program) for node in nodes):
        return
    graph, pairs = program.graph, Pairs()
    for node in nodes:
        if node.op == "placeholder":
            _make_real(program, node)
            pairs[node] = node
            continue
        with graph.inserting_before(node):
            written = _FORMS[node.target](_Writer(graph, node, pairs), *node.args)
        pairs[node] = written
        if not _is_complex(node):
            node.replace_all_uses_with(written)
            program.graph_signature.replace_all_uses(node.name, written.name)
    for node in reversed(nodes):
        if node.op != "placeholder":
            graph.erase_node(node)
    program.graph_module.recompile()


def _touches(node: fx.Node) -> bool:
    """Whether the node is complex or reads a tensor that is."""
    return node.op != "output" and (_is_complex(node) or any(_is_complex(source) for source in node.all_input_nodes))


def _is_complex(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else node
    return isinstance(value, complex) or (isinstance(value, Tensor) and value.dtype.is_complex)


def _is_supported(node: fx.Node, program: ExportedProgram) -> bool:
    if not is_fixed(node.meta["val"]) or any(user.op == "output" for user in node.users if _is_complex(node)):
        return False
    if node.op == "placeholder":
        return node.name in constants_of(program)
    matrix = node.target is not _ATEN.numpy_T.default or node.meta["val"].dim() == 2
    return node.target in _FORMS and not node.kwargs and matrix


def _make_real(program: ExportedProgram, node: fx.Node) -> None:
    """Turn a complex constant, and the value of its placeholder, into pairs."""
    name, fake = constants_of(program)[node.name], node.meta["val"]
    holder: Any = program.state_dict if name in program.state_dict else program.constants
    real = torch.view_as_real(holder[name].detach().resolve_conj()).contiguous()
    holder[name] = nn.Parameter(real, requires_grad=False) if isinstance(holder[name], nn.Parameter) else real
    node.meta["val"] = fake.fake_mode.from_tensor(real)


class _Writer:
    """Writes one node in real operators."""

    def __init__(self, graph: fx.Graph, node: fx.Node, pairs: Pairs) -> None:
        self.call, self.node, self.pairs = partial(add_node, graph, node), node, pairs
        self.shape = list(node.meta["val"].shape)

    def pair(self, value: Any) -> Any:
        """The pairs of a complex tensor."""
        return self.pairs[value]

    def dim(self, value: Any, dim: int) -> int:
        """A dim counted from the front, since pairs add one at the end."""
        rank: int = self.node.args[0].meta["val"].dim() if isinstance(value, fx.Node) else len(self.shape)  # type: ignore[union-attr]
        return dim % rank

    def parts(self, value: Any) -> tuple[Any, Any]:
        """The real and the imaginary part of anything; `None` for an imaginary part that is zero."""
        if isinstance(value, complex):
            return value.real, value.imag
        if not isinstance(value, fx.Node) or value not in self.pairs:
            return value, None
        real, imaginary = (self.call(_ATEN.select.int, self.pairs[value], -1, index) for index in (0, 1))
        return real, imaginary

    def join(self, real: Any, imaginary: Any) -> fx.Node:
        """Pairs of two parts, which are expanded to the node's shape."""
        sides = [self.call(_ATEN.expand.default, side, self.shape) for side in (real, imaginary)]
        return self.call(_ATEN.stack.default, sides, -1)

    def binary(self, operator: Any, left: Any, right: Any) -> Any:
        """A tensor operator of two values, of which one may be a number."""
        if not isinstance(left, fx.Node) and not isinstance(right, fx.Node):
            raise AssertionError("a complex operator of numbers alone")
        if not isinstance(left, fx.Node):
            left = self.call(_ATEN.full_like.default, right, left)
        return self.call(operator, left, right)


def _write_reshape(w: _Writer, x: Any, *_: Any) -> fx.Node:
    return w.call(_ATEN.reshape.default, w.pair(x), [*w.shape, 2])


def _write_expand(w: _Writer, x: Any, *_: Any) -> fx.Node:
    return w.call(_ATEN.expand.default, w.pair(x), [*w.shape, 2])


def _same(w: _Writer, x: Any, *_: Any) -> fx.Node:
    same: fx.Node = w.pair(x)
    return same


def _write_with_dims(operator: Any, dims: int) -> Callable[..., fx.Node]:
    """An operator whose first `dims` arguments behind the tensor are dims."""

    def write(w: _Writer, x: Any, *given: Any) -> fx.Node:
        rest = given if given else (0,) * dims
        return w.call(operator, w.pair(x), *(w.dim(x, d) for d in rest[:dims]), *rest[dims:])

    return write


def _write_permute(w: _Writer, x: Any, dims: list[int]) -> fx.Node:
    return w.call(_ATEN.permute.default, w.pair(x), [*(d % len(dims) for d in dims), len(dims)])


def _write_transpose(w: _Writer, x: Any) -> fx.Node:
    """`x.T` of a matrix, `x.mT` of any."""
    rank = len(w.shape)
    return w.call(_ATEN.transpose.int, w.pair(x), rank - 2, rank - 1)


def _write_join(operator: Any) -> Callable[..., fx.Node]:
    """`cat` or `stack` of complex tensors."""

    def write(w: _Writer, tensors: list[Any], dim: int = 0) -> fx.Node:
        return w.call(operator, [w.pair(x) for x in tensors], dim % len(w.shape))

    return write


def _product(operator: Any) -> Callable[..., fx.Node]:
    """`(a + bi) (c + di) = (ac - bd) + (ad + bc) i`."""

    def write(w: _Writer, left: Any, right: Any) -> fx.Node:
        (a, b), (c, d) = w.parts(left), w.parts(right)
        if b is None or d is None:
            one, (real, imaginary) = (left, (c, d)) if b is None else (right, (a, b))
            sides = [(one, part) if b is None else (part, one) for part in (real, imaginary)]
            return w.join(*(w.binary(operator, *side) for side in sides))
        real = w.call(_ATEN.sub.Tensor, w.binary(operator, a, c), w.binary(operator, b, d))
        return w.join(real, w.call(_ATEN.add.Tensor, w.binary(operator, a, d), w.binary(operator, b, c)))

    return write


def _sum(operator: Any) -> Callable[..., fx.Node]:
    def write(w: _Writer, left: Any, right: Any) -> fx.Node:
        (a, b), (c, d) = w.parts(left), w.parts(right)
        real = w.binary(operator, a, c)
        if d is None:
            return w.join(real, b)
        return w.join(real, w.call(_ATEN.neg.default, d) if b is None and operator is _ATEN.sub.Tensor else
                        d if b is None else w.binary(operator, b, d))  # fmt: skip

    return write


def _quotient(w: _Writer, left: Any, right: Any) -> fx.Node:
    """By a real number or tensor, or by way of the conjugate."""
    (a, b), (c, d) = w.parts(left), w.parts(right)
    if d is None:
        return w.join(w.call(_ATEN.div.Tensor, a, c), w.call(_ATEN.div.Tensor, b, c))
    square = w.call(_ATEN.add.Tensor, w.binary(_ATEN.mul.Tensor, c, c), w.binary(_ATEN.mul.Tensor, d, d))
    times = _ATEN.mul.Tensor
    if b is None:
        real, imaginary = w.binary(times, a, c), w.call(_ATEN.neg.default, w.binary(times, a, d))
    else:
        real = w.call(_ATEN.add.Tensor, w.binary(times, a, c), w.binary(times, b, d))
        imaginary = w.call(_ATEN.sub.Tensor, w.binary(times, b, c), w.binary(times, a, d))
    return w.join(w.call(_ATEN.div.Tensor, real, square), w.call(_ATEN.div.Tensor, imaginary, square))


def _spectrum(w: _Writer, x: Any, *given: Any) -> fx.Node:
    """The one transform that has a kernel; its result is read as pairs."""
    return w.call(_ATEN.view_as_real.default, w.call(_ATEN.fft_rfft.default, x, *given))


def _conjugate(w: _Writer, x: Any) -> fx.Node:
    real, imaginary = w.parts(x)
    return w.join(real, w.call(_ATEN.neg.default, imaginary))


def _magnitude(w: _Writer, x: Any) -> fx.Node:
    return w.call(_ATEN.sqrt.default, w.call(_ATEN.add.Tensor, *(w.binary(_ATEN.mul.Tensor, p, p) for p in w.parts(x))))


def _angle(w: _Writer, x: Any) -> fx.Node:
    real, imaginary = w.parts(x)
    return w.call(_ATEN.atan2.default, imaginary, real)


def _polar(w: _Writer, length: Any, angle: Any) -> fx.Node:
    sides = (w.call(_ATEN.cos.default, angle), w.call(_ATEN.sin.default, angle))
    return w.join(*(w.call(_ATEN.mul.Tensor, length, side) for side in sides))


def _exponential(w: _Writer, x: Any) -> fx.Node:
    real, imaginary = w.parts(x)
    return _polar(w, w.call(_ATEN.exp.default, real), imaginary)


_FORMS: dict[Any, Callable[..., fx.Node]] = {
    _ATEN.view_as_complex.default: lambda w, x: x,
    _ATEN.view_as_real.default: _same,
    _ATEN.complex.default: lambda w, real, imaginary: w.join(real, imaginary),
    _ATEN.polar.default: _polar,
    _ATEN.fft_rfft.default: _spectrum,
    _ATEN.real.default: lambda w, x: w.parts(x)[0],
    _ATEN.imag.default: lambda w, x: w.parts(x)[1],
    _ATEN.abs.default: _magnitude,
    _ATEN.angle.default: _angle,
    _ATEN.exp.default: _exponential,
    _ATEN.neg.default: lambda w, x: w.call(_ATEN.neg.default, w.pair(x)),
    **dict.fromkeys((_ATEN.conj.default, _ATEN._conj.default, _ATEN.conj_physical.default), _conjugate),
    **dict.fromkeys((_ATEN.resolve_conj.default, _ATEN.clone.default, _ATEN.contiguous.default, _ATEN.alias.default,
                     _ATEN.detach.default, _ATEN.lift_fresh_copy.default, _ATEN.detach_.default), _same),
    **{operator: _product(operator) for operator in (_ATEN.mul.Tensor, _ATEN.matmul.default, _ATEN.bmm.default,
                                                     _ATEN.mm.default)},
    **{operator: _sum(operator) for operator in (_ATEN.add.Tensor, _ATEN.sub.Tensor)},
    _ATEN.div.Tensor: _quotient,
    **dict.fromkeys((_ATEN.reshape.default, _ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.flatten.using_ints,
                     _ATEN.unflatten.int, _ATEN.unsqueeze.default, _ATEN.squeeze.dim, _ATEN.squeeze.default,
                     _ATEN.squeeze.dims), _write_reshape),
    **dict.fromkeys((_ATEN.expand.default, _ATEN.expand_as.default), _write_expand),
    _ATEN.transpose.int: _write_with_dims(_ATEN.transpose.int, 2),
    _ATEN.slice.Tensor: _write_with_dims(_ATEN.slice.Tensor, 1),
    _ATEN.select.int: _write_with_dims(_ATEN.select.int, 1),
    _ATEN.narrow.default: _write_with_dims(_ATEN.narrow.default, 1),
    _ATEN.permute.default: _write_permute,
    **dict.fromkeys((_ATEN.numpy_T.default, _ATEN.mT.default, _ATEN.t.default), _write_transpose),
    _ATEN.cat.default: _write_join(_ATEN.cat.default),
    _ATEN.stack.default: _write_join(_ATEN.stack.default),
}  # fmt: skip
