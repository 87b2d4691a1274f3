"""What will go wrong or slow in an export, found before the lowering: each with its module, its reason and a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from edgetune.capture import failures, operators
from edgetune.capture.graph import capture, prepare
from edgetune.capture.positional import Positional, as_program
from edgetune.core.carriers import is_wrapped
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs, tensors_of
from edgetune.core.quiet import quiet
from edgetune.export import stored
from edgetune.export.lower import marked
from edgetune.export.targets import Target
from edgetune.program import operator_kinds
from edgetune.runtime import remedies

Severity = Literal["error", "warning", "note"]

_ORDER = ("error", "warning", "note")
_REFUSED = {torch.bfloat16: "bf16", torch.float64: "fp64", torch.complex64: "complex", torch.complex128: "complex"}
_MULTIPLY = ("addmm", "mm", "bmm", "linear", "matmul", "baddbmm", "convolution", "conv1d", "conv2d", "conv3d")
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Finding:
    """One thing to know before an export.

    An error stops the export or makes its outcome wrong; a warning leaves multiply-accumulates or a weight's type to
    slow kernels; a note is a small operator that the backend does not take, or what export puts right by itself.
    """

    severity: Severity
    operator: str  # empty where it is no operator
    module: str  # empty for the model itself
    reason: str
    remedy: str
    count: int = 1
    macs_pct: float = 0.0  # of the model's multiply-accumulates

    def __str__(self) -> str:
        what = f"{self.operator} in {self.module or 'the model itself'}" if self.operator else self.module
        times = f" (x{self.count})" if self.count > 1 else ""
        share = f", {self.macs_pct:.1f} % of the MACs" if self.macs_pct else ""
        text = f"{self.severity}: {what or 'the model'}{times}{share}: {self.reason}"
        return f"{text}\n  next: {self.remedy}" if self.remedy else text


def lint(model: nn.Module, example_inputs: Inputs, target: Target) -> tuple[Finding, ...]:
    """Every finding for an export of `model` to `target`, errors first. Lowers nothing and changes nothing.

    The model is captured as `export` does it, and the backend's partitioner is asked which operators it takes.
    """
    found = [*_inputs(example_inputs), *_layers(model), *_quantized(model, target)]
    tensors = tuple(t.detach().cpu().contiguous() for t in tensors_of(example_inputs))
    with as_program(model, example_inputs) as program:
        found += _graph(program, tensors, target)
    return tuple(sorted(found, key=lambda finding: (_ORDER.index(finding.severity), -finding.macs_pct)))


def _inputs(inputs: Inputs) -> Iterator[Finding]:
    names = list(inputs) if isinstance(inputs, dict) else [f"input_{i}" for i in range(len(tensors_of(inputs)))]
    for name, tensor in zip(names, tensors_of(inputs)):  # noqa: B905  made from one another
        if not tensor.is_contiguous():
            reason = f"{name} is not in memory order (strides {tensor.stride()}): the runtime misreads such an input"
            yield Finding("error", "", "", reason, f"give {name}.contiguous() here and in the app")
        if tensor.dtype in _REFUSED:
            reason = f"{name} is {_REFUSED[tensor.dtype]}, which the backend refuses"
            yield Finding("warning", "", "", reason, f"give {name} as float32")


def _layers(model: nn.Module) -> Iterator[Finding]:
    for name, layer in model.named_modules():
        if is_wrapped(layer):
            reason = f"{type(layer).__name__} has an adapter or slices, which run on slow kernels"
            yield Finding("error", "", name, reason, "fold it first: model = et.finalize(model)")
        if layer.training and isinstance(layer, _DROPOUTS) and layer.p > 0:
            reason = f"dropout in training mode (p = {layer.p:g})"
            yield Finding("note", "", name, reason, "call model.eval(); export does this automatically")
        for dtype in sorted({p.dtype for p in layer.parameters(recurse=False)} & set(_REFUSED), key=str):
            reason = f"its weights are {_REFUSED[dtype]}, which the backend refuses: they run on slow kernels"
            yield Finding("warning", "", name, reason, "convert it: model.float()")


def _quantized(model: nn.Module, target: Target) -> Iterator[Finding]:
    for layer in stored.unfit(model, target):
        yield Finding("error", "", layer.module, layer.reason, layer.remedy)


def _graph(model: Positional, inputs: tuple[Tensor, ...], target: Target) -> list[Finding]:
    with quiet(), torch.no_grad():
        try:
            program = capture(model, inputs, target.name)
            prepare(program)
            found = [*_shapes(program), *_random(program)]
            if target.partitioners():
                with _reasons() as reasons:
                    tagged = marked(program, target)
                found += _undelegated(program, tagged, reasons)
        except EdgetuneError as error:
            return [Finding("error", "", error.where.removeprefix("module "), error.what, error.action)]
    return found


def _shapes(program: ExportedProgram) -> Iterator[Finding]:
    """Sizes that are known only when the program runs."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor) and free_unbacked_symbols(value.shape):
            reason = f"the shape of its output, {tuple(map(str, value.shape))}, depends on the values of its input"
            remedy = remedies.remedy(str(node.target)) or "compute with a mask of a fixed shape (torch.where) instead"
            yield Finding("error", str(node.target), operators.module_of(node), reason, remedy)


def _random(program: ExportedProgram) -> Iterator[Finding]:
    """Operators that draw random numbers also in eval mode."""
    for node in program.graph.nodes:
        if failures.draws(node):
            reason = "it draws random numbers although the model is in eval mode"
            yield Finding("error", str(node.target), operators.module_of(node), reason, "draw only `if self.training`")


def _undelegated(program: ExportedProgram, tagged: ExportedProgram, reasons: dict[str, str]) -> list[Finding]:
    """The operators of the edge program that no partition holds, those of one module and reason together."""
    modules, macs = operators.modules(program), operators.macs_of(program)
    whole = max(sum(macs.values()), 1)
    grouped: dict[tuple[str, str, str], list[int | None]] = {}
    for node in tagged.graph.nodes:
        name = str(node.target)
        if node.op != "call_function" or "delegation_tag" in node.meta or _is_bookkeeping(node):
            continue
        number = operators.number_of(node)
        module = modules.get(number, "") if number is not None else ""
        key = (operator_kinds.plain_name(name), module, reasons.get(node.name) or _why(node))
        grouped.setdefault(key, []).append(number)
    found = []
    for (operator, module, reason), numbers in grouped.items():
        multiplies = operator.split(".")[1] in _MULTIPLY  # not what moves the data for it
        share = 100.0 * sum(macs.get(n, 0) for n in set(numbers) if n is not None) / whole if multiplies else 0.0
        severity: Severity = "warning" if share else "note"
        remedy = remedies.remedy(operator)
        found.append(Finding(severity, operator, module, reason, remedy, len(numbers), share))
    return found


def _is_bookkeeping(node: fx.Node) -> bool:
    name = str(node.target)
    return operator_kinds.is_free(operator_kinds.plain_name(name)) or name.startswith("<built-in")


def _why(node: fx.Node) -> str:
    """The reason where the partitioner gives none."""
    values = [source.meta.get("val") for source in node.all_input_nodes] + [node.meta.get("val")]
    types = {value.dtype for value in values if isinstance(value, Tensor)}
    whole = sorted(str(t).removeprefix("torch.") for t in types if not t.is_floating_point)
    if whole:
        return f"it reads or writes {', '.join(whole)}, and the backend computes in floating point"
    refused = sorted(_REFUSED[t] for t in types if t in _REFUSED)
    return f"it computes in {', '.join(refused)}" if refused else "the backend has no such operator, or not this form"


@contextmanager
def _reasons() -> Iterator[dict[str, str]]:
    """Why executorch's partitioners refuse a node, by its name: they tell a logger, which is listened to here."""
    from executorch.exir.backend.utils import WhyNoPartition

    found: dict[str, str] = {}
    stock = WhyNoPartition.__call__

    def heard(self: Any, node: fx.Node, reason: str) -> None:
        if reason != "invalid dtype":  # `_why` says which
            found.setdefault(node.name, reason)

    WhyNoPartition.__call__ = heard
    try:
        yield found
    finally:
        WhyNoPartition.__call__ = stock
