"""Find, in the source code of the modules around a layer, reads of its weight that forward is certain to reach.

Only certain reads count: of a layer reached by attributes of `self`, in `forward` or in a method or property that it
calls, on a path whose conditions hold for this module. Watching a forward finds the rest.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

# attributes of a weight that do not need its values
_LOOKS_ONLY = frozenset(
    {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "nelement", "element_size", "requires_grad", "is_cuda",
     "is_meta", "layout", "data_ptr", "names", "grad", "grad_fn", "is_floating_point", "stride", "type", "get_device",
     "is_contiguous", "nbytes", "itemsize", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor",
     "quant_type", "quant_state", "register_hook", "requires_grad_"}
)  # fmt: skip
_LOOKERS = frozenset({"isinstance", "hasattr", "id", "type", "len", "zeros_like", "ones_like", "empty_like",
                      "full_like", "to", "type_as", "is_tensor"})  # fmt: skip
_UNKNOWN = object()
_DEEPEST = 6  # calls from forward on


def read_in_source(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """For each of these layers whose weight a module around it is certain to read: the names of those modules."""
    layers = {id(model.get_submodule(name)): name for name in names}
    around = {outer: model.get_submodule(outer) for name in layers.values() for outer in outer_names(name)}
    readers: dict[str, list[str]] = {}
    for outer, module in around.items():
        for layer in _layers_read_by(module):
            if id(layer) in layers and id(layer) != id(module):
                readers.setdefault(layers[id(layer)], []).append(outer)
    return readers


def outer_names(name: str) -> list[str]:
    """Names of the modules around the layer called `name`, the model itself, "", first."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def _layers_read_by(module: nn.Module) -> Iterator[nn.Module]:
    """Layers whose weight the forward of this module certainly reads."""
    if isinstance(module, nn.MultiheadAttention):
        yield module.out_proj
    elif isinstance(module, nn.TransformerEncoderLayer):  # on its fast path
        yield from (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    elif not type(module).__module__.startswith("torch."):
        forward = inspect.unwrap(module.forward)
        yield from _ForwardReader(module).reads(getattr(forward, "__func__", forward), type(module), 0)


@functools.lru_cache(maxsize=4096)
def _parse_function(code: types.CodeType) -> ast.FunctionDef | None:
    """The syntax tree of a function; `None` if its source is not available."""
    try:
        tree = ast.parse(textwrap.dedent("".join(inspect.getsourcelines(code)[0])))
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    return next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)


class _ForwardReader:
    """Walks the statements that the forward of one module runs."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.seen: set[types.CodeType] = set()

    def reads(self, function: Any, kind: type, depth: int) -> Iterator[nn.Module]:
        """Reads in the function and in what it calls; `kind` is where `super()` starts from."""
        code = getattr(function, "__code__", None)
        if code is None or code in self.seen or depth > _DEEPEST:
            return
        self.seen.add(code)
        body = _parse_function(code)
        if body is None or not body.args.args:
            return
        owner = next((c for c in type(self.module).__mro__ if function in vars(c).values()), kind)
        yield from _Walk(self, body.args.args[0].arg, owner, depth).statements(body.body)


class _Walk:
    """One function's statements; `me` is its name for the module."""

    def __init__(self, reader: _ForwardReader, me: str, owner: type, depth: int) -> None:
        self.reader, self.me, self.owner, self.depth = reader, me, owner, depth
        self.ended = False  # a statement before this one may have left the function

    def statements(self, body: Sequence[ast.stmt]) -> Iterator[nn.Module]:
        """Reads in the statements that are certain to run."""
        for statement in body:
            if self.ended:
                return
            yield from self.statement(statement)

    def statement(self, node: ast.stmt) -> Iterator[nn.Module]:
        """Reads in one statement; of a branch that may not run, only in its condition."""
        if isinstance(node, ast.If):
            yield from self.expression(node.test)
            holds = self.value(node.test)
            if holds is _UNKNOWN:
                self.ended |= _may_leave(node)
            else:
                yield from self.statements(node.body if holds else node.orelse)
        elif isinstance(node, (ast.With, ast.AsyncWith)):
            for item in node.items:
                yield from self.expression(item.context_expr)
            yield from self.statements(node.body)
        elif isinstance(node, ast.For):
            yield from self.expression(node.iter)  # the body may run for none
            self.ended |= _may_leave(node)
        elif isinstance(node, (ast.While, ast.Try, ast.FunctionDef, ast.ClassDef, ast.AsyncFor, ast.Match)):
            self.ended |= _may_leave(node) and not isinstance(node, (ast.FunctionDef, ast.ClassDef))
        elif isinstance(node, (ast.Return, ast.Raise)):
            for child in ast.iter_child_nodes(node):
                yield from self.expression(child)
            self.ended = True
        elif not isinstance(node, (ast.Assert, ast.Delete)):
            for child in ast.iter_child_nodes(node):
                yield from self.expression(child)

    def expression(self, node: ast.AST, looks_only: bool = False) -> Iterator[nn.Module]:
        """Reads in the expression, and in the methods and properties that it calls."""
        if isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            return
        if isinstance(node, ast.IfExp):
            yield from self.expression(node.test)
            holds = self.value(node.test)
            if holds is not _UNKNOWN:
                yield from self.expression(node.body if holds else node.orelse)
            return
        if isinstance(node, ast.BoolOp):
            yield from self.expression(node.values[0])
            return
        if isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            looks_only = True
        elif isinstance(node, ast.Attribute):
            if isinstance(node.ctx, ast.Load):
                yield from self.attribute(node, looks_only)
            looks_only = node.attr in _LOOKS_ONLY
        elif isinstance(node, ast.Call):
            yield from self.follow_call(node)
            looks_only = _name(node.func) in _LOOKERS
            yield from self.expression(node.func)
            for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                yield from self.expression(argument, looks_only)
            return
        for child in ast.iter_child_nodes(node):
            yield from self.expression(child, looks_only)

    def attribute(self, node: ast.Attribute, looks_only: bool) -> Iterator[nn.Module]:
        """A weight, or a property of the module's own class."""
        if node.attr == "weight" and not looks_only:
            layer = self.value(node.value)
            if isinstance(layer, nn.Module) and layer is not self.reader.module:
                yield layer
        if isinstance(node.value, ast.Name) and node.value.id == self.me:
            own = inspect.getattr_static(type(self.reader.module), node.attr, None)
            if isinstance(own, property) and own.fget is not None:
                yield from self.reader.reads(own.fget, self.owner, self.depth + 1)

    def follow_call(self, node: ast.Call) -> Iterator[nn.Module]:
        """A method of the module's own class, or of the class above."""
        if not isinstance(node.func, ast.Attribute):
            return
        function: Any = None
        if isinstance(node.func.value, ast.Name) and node.func.value.id == self.me:
            function = inspect.getattr_static(type(self.reader.module), node.func.attr, None)
        elif isinstance(node.func.value, ast.Call) and _name(node.func.value.func) == "super":
            order = type(self.reader.module).__mro__
            above = order[order.index(self.owner) + 1 :] if self.owner in order else ()
            function = next((vars(c)[node.func.attr] for c in above if node.func.attr in vars(c)), None)
        if isinstance(function, types.FunctionType):
            yield from self.reader.reads(inspect.unwrap(function), self.owner, self.depth + 1)

    def value(self, node: ast.AST) -> Any:
        """The value of an expression over the module's own attributes; `_UNKNOWN` if anything else is in it."""
        try:
            return self._value(node)
        except Exception:  # an attribute that is missing, a comparison that raises
            return _UNKNOWN

    def _value(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self.reader.module if node.id == self.me else _UNKNOWN
        if isinstance(node, ast.Attribute):
            outer = self.value(node.value)
            if outer is _UNKNOWN or node.attr in ("training", "is_scripting", "grad"):
                return _UNKNOWN
            if hasattr(inspect.getattr_static(type(outer), node.attr, None), "__get__"):
                return _UNKNOWN  # a property or a method: it would have to be run
            return getattr(outer, node.attr)
        if isinstance(node, ast.Subscript):
            outer, index = self.value(node.value), self.value(node.slice)
            return _UNKNOWN if outer is _UNKNOWN or not isinstance(index, (int, str)) else outer[index]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self.value(node.operand)
            return _UNKNOWN if inner is _UNKNOWN else not inner
        if isinstance(node, ast.BoolOp):
            return self._bool_value(node)
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = self.value(node.left), self.value(node.comparators[0])
            compare = _COMPARED.get(type(node.ops[0]))
            return _UNKNOWN if _UNKNOWN in (left, right) or compare is None else bool(compare(left, right))
        return _UNKNOWN

    def _bool_value(self, node: ast.BoolOp) -> Any:
        decides = isinstance(node.op, ast.Or)
        values = [self.value(inner) for inner in node.values]
        if any(value is not _UNKNOWN and bool(value) == decides for value in values):
            return decides
        return _UNKNOWN if any(value is _UNKNOWN for value in values) else not decides


_COMPARED: dict[type[ast.cmpop], Any] = {
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
}


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _may_leave(node: ast.stmt) -> bool:
    """Whether a statement inside may leave the function."""
    return any(isinstance(inner, (ast.Return, ast.Raise)) for inner in ast.walk(node))
