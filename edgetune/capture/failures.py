"""Errors for what cannot be exported, with the module that it comes from."""

from __future__ import annotations

import re
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode, resolve_name

from edgetune.capture import operators
from edgetune.core.errors import EdgetuneError, Exit, truncate_list
from edgetune.runtime import remedies

_DATA_DEPENDENT = "GuardOnDataDependent|data-dependent|Data dependent|_local_scalar_dense|unbacked"

_NO_OPERATOR = ("torch._C._set_grad_enabled", "_set_grad_enabled")  # called by torch.export itself


def capture_error(model: nn.Module, inputs: tuple[Tensor, ...], error: Exception) -> EdgetuneError:
    """The error for a model that `torch.export` cannot follow, with the module and the call it stopped at."""
    module, function = _where_it_stops(model, inputs)
    node = None if module or function else _node_in(error)
    module = module if node is None else operators.module_of(node)
    depends = re.search(_DATA_DEPENDENT, f"{type(error).__name__} {error}") is not None
    problem = (
        "the forward pass decides by the values of a tensor" if depends else f"torch.export stopped: {_first(error)}"
    )
    remedy = remedies.remedy(function) or remedies.remedy(function.rpartition(".")[2])
    branch = "replace the if or loop over tensor values by torch.where or torch.cond"
    if depends and module and isinstance(_at(model, module), (nn.TransformerEncoder, nn.TransformerDecoder)):
        branch = "pass is_causal=False to it: it then uses its mask unchanged, without checking whether it is causal"
    change = f"change that module so that torch.export.export follows it ({type(error).__name__})"
    return EdgetuneError(
        f"the model cannot be exported: {problem}" + (f"; operator {function}" if function else ""),
        where=f"module {module}" if module else "",
        action=branch if depends else remedy or change,
        exit_code=Exit.EXPORT,
    )


def _at(model: nn.Module, shortened_name: str) -> nn.Module | None:
    """The module of this name, as `operators.shorten` gives it."""
    return next((m for name, m in model.named_modules() if operators.shorten(name) == shortened_name), None)


@contextmanager
def no_partial_graph() -> Iterator[None]:
    """Keep torch.export from printing its partial graph, hundreds of lines, when it fails."""
    from torch.export import _trace

    _trace.print = lambda *_, **__: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del _trace.print  # type: ignore[attr-defined]


class _LastCall(TorchFunctionMode):
    """Remembers the last torch function that was called."""

    name = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        if name not in _NO_OPERATOR and not name.endswith(".__get__"):
            self.name = name
        return func(*args, **(kwargs or {}))


def _where_it_stops(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[str, str]:
    """Export once more and record every module entered and left: the failure is in the last one not left."""
    stack: list[str] = []
    handles = []

    def left(*_: object) -> None:
        stack.pop()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))  # type: ignore[misc]
        handles.append(module.register_forward_hook(left))
    last = _LastCall()
    try:
        with last, no_partial_graph():
            torch.export.export(model, inputs, strict=False)
        return "", ""
    except Exception:  # the same one as before; only its location is needed
        return operators.shorten(stack[-1]) if stack else "", last.name
    finally:
        for handle in handles:
            handle.remove()


def draws(node: fx.Node) -> bool:
    """Whether a node of a model that does not train draws random numbers."""
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    given = dict(zip((argument.name for argument in node.target._schema.arguments), node.args, strict=False))
    return given.get("train", node.kwargs.get("train")) is not False  # dropout alone, or that of a recurrent layer


def check_drawn(program: ExportedProgram) -> None:
    """Raise for a captured program that draws random numbers: it cannot be verified."""
    drawn = [node for node in program.graph.nodes if draws(node)]
    if drawn:
        places = dict.fromkeys(f"{node.target} in {operators.module_of(node) or 'the model itself'}" for node in drawn)
        raise EdgetuneError(
            f"the model draws random numbers although it is in eval mode: {truncate_list(places, 4)}",
            action=remedies.remedy(str(drawn[0].target)) or "draw only `if self.training`, or pass the numbers in",
            exit_code=Exit.EXPORT,
        )


def lowering_error(program: ExportedProgram, target: str, error: Exception) -> EdgetuneError:
    """The error for a graph that executorch cannot lower: the operators it names, and the modules they are in."""
    text = _chain(error)
    modules = operators.modules(program)
    failing: Counter[tuple[str, str]] = Counter()
    for node in program.graph.nodes:
        if node.op == "call_function" and _named_in(str(node.target), text):
            number = operators.number_of(node)
            failing[str(node.target), modules.get(number, "") if number is not None else ""] += 1
    worked_on = None if failing else _node_in(error)
    if worked_on is not None:
        number = operators.number_of(worked_on)
        failing[str(_aten(worked_on)), modules.get(number, "") if number is not None else ""] += 1
    named = sorted(set(re.findall(r"Missing out variants: \{([^}]*)\}", text)))
    missing = ", ".join(named).replace("'", "")
    problem = f"no kernel for {missing}" if missing else _first(error)
    places = [f"{operator} in {module or 'the model itself'}" for operator, module in failing]
    operators_named = dict.fromkeys([*missing.split(", "), *(operator for operator, _ in failing)])
    hints = dict.fromkeys(filter(None, map(remedies.remedy, operators_named)))
    return EdgetuneError(
        f"the model cannot be lowered for {target}: {problem}" + (f" ({truncate_list(places)})" if places else ""),
        action="; ".join(hints) or "replace these operators, or leave their modules out of what is exported",
        exit_code=Exit.EXPORT,
    )


def _named_in(target: str, text: str) -> bool:
    """Whether the message names this operator, as `ns::op`, `ns.op` or `ns.op.overload`."""
    namespace, _, rest = target.partition(".")
    operator = rest.partition(".")[0]
    return re.search(rf"\b{re.escape(namespace)}(::|\.){re.escape(operator)}\b", text) is not None


def _node_in(error: BaseException) -> fx.Node | None:
    """The node that a pass failed at, if the error names none: an argument of its innermost function."""
    for each in reversed(list(_causes(error))):
        for frame, _ in reversed(list(traceback.walk_tb(each.__traceback__))):
            for value in frame.f_locals.values():
                if isinstance(value, fx.Node) and isinstance(_aten(value), OpOverload):
                    return value
    return None


def _aten(node: fx.Node) -> Any:
    """What a node calls, without executorch's wrapper."""
    return node.target if isinstance(node.target, OpOverload) else getattr(node.target, "_op", node.target)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _chain(error: BaseException) -> str:
    return "\n".join(str(each) for each in _causes(error))


def _first(error: Exception) -> str:
    """The first line that is not empty."""
    lines = [line.strip() for line in _chain(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
