"""Predict what will fail or run slowly in an export, each with its module, its reason and a remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from edgetune.core.quiet import silence_libraries
from edgetune.export import quantized_weights
from edgetune.export.lower import tag_delegated
from edgetune.export.program_inputs import names_of
from edgetune.export.targets.target import Target
from edgetune.program import operator_kinds
from edgetune.runtime import remedies

Severity = Literal["error", "warning", "note"]

_ORDER = ("error", "warning", "note")
_REFUSED = {
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.complex64: "complex",
    torch.complex128: "complex",
}  # unless a target takes them
Refused = Mapping[torch.dtype, str]
_MULTIPLY = ("addmm", "mm", "bmm", "linear", "matmul", "baddbmm", "convolution", "conv1d", "conv2d", "conv3d")
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Finding:
    """One problem of an export.

    An error stops the export or makes the program wrong; a warning means multiply-accumulates on slow kernels; a note
    is a small undelegated operator, or something that export corrects automatically.
    """

    severity: Severity
    operator: str  # empty if the finding is about a module
    module: str  # empty for the model itself
    reason: str
    remedy: str
    count: int = 1
    macs_pct: float = 0.0  # of the model's multiply-accumulates

    def __str__(self) -> str:
        place = f"{self.operator} in {self.module or 'the model itself'}" if self.operator else self.module
        times = f" (x{self.count})" if self.count > 1 else ""
        share = f", {self.macs_pct:.1f} % of the MACs" if self.macs_pct else ""
        text = f"{self.severity}: {place or 'the model'}{times}{share}: {self.reason}"
        return f"{text}\n  next: {self.remedy}" if self.remedy else text


def lint(model: nn.Module, example_inputs: Inputs, target: Target) -> tuple[Finding, ...]:
    """Every finding for an export of `model` to `target`, errors first. Lowers nothing and changes nothing.

    Captures the model as `export` does, and asks the backend's partitioner which operators it takes.
    """
    refused = {dtype: name for dtype, name in _REFUSED.items() if name not in target.takes}
    findings = [*_check_inputs(example_inputs, refused), *_check_layers(model, refused)]
    for layer in quantized_weights.unsupported_layers(model, target):
        findings.append(Finding("error", "", layer.module, layer.reason, layer.remedy))
    tensors = tuple(t.detach().cpu().contiguous() for t in tensors_of(example_inputs))
    with as_program(model, example_inputs) as program:
        findings += _check_graph(program, tensors, target, refused)
    return tuple(sorted(findings, key=lambda finding: (_ORDER.index(finding.severity), -finding.macs_pct)))


def _check_inputs(inputs: Inputs, refused: Refused) -> Iterator[Finding]:
    for name, tensor in zip(names_of(inputs), tensors_of(inputs), strict=True):
        if not tensor.is_contiguous():
            reason = f"{name} is not contiguous (strides {tensor.stride()}): the runtime misreads such an input"
            yield Finding("error", "", "", reason, f"pass {name}.contiguous() here and in the app")
        if tensor.dtype in refused:
            reason = f"{name} is {refused[tensor.dtype]}, which the backend refuses"
            yield Finding("warning", "", "", reason, f"pass {name} as float32")


def _check_layers(model: nn.Module, refused: Refused) -> Iterator[Finding]:
    for name, layer in model.named_modules():
        if is_wrapped(layer):
            reason = f"{type(layer).__name__} has an adapter or slices, which run on slow kernels"
            yield Finding("error", "", name, reason, "merge it first: model = et.finalize(model)")
        if layer.training and isinstance(layer, _DROPOUTS) and layer.p > 0:
            reason = f"dropout in training mode (p = {layer.p:g})"
            yield Finding("note", "", name, reason, "call model.eval(); export does this automatically")
        for dtype in sorted({p.dtype for p in layer.parameters(recurse=False)} & set(refused), key=str):
            reason = f"its weights are {refused[dtype]}, which the backend refuses: they run on slow kernels"
            yield Finding("warning", "", name, reason, "convert it: model.float()")


def _check_graph(model: Positional, inputs: tuple[Tensor, ...], target: Target, refused: Refused) -> list[Finding]:
    with silence_libraries(), torch.no_grad():
        try:
            program = capture(model, inputs, target.name)
            prepare(program)
            findings = [*_check_shapes(program), *_check_random(program)]
            if target.partitioners():
                with _record_reasons() as reasons:
                    tagged = tag_delegated(program, target)
                findings += _check_undelegated(program, tagged, reasons, refused)
        except EdgetuneError as error:
            return [Finding("error", "", error.where.removeprefix("module "), error.what, error.action)]
    return findings


def _check_shapes(program: ExportedProgram) -> Iterator[Finding]:
    """Sizes that depend on the values of the inputs."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor) and free_unbacked_symbols(value.shape):
            reason = f"the shape of its output, {tuple(map(str, value.shape))}, depends on the values of its input"
            remedy = remedies.remedy(str(node.target)) or "use a mask of a fixed shape instead (torch.where)"
            yield Finding("error", str(node.target), operators.module_of(node), reason, remedy)


def _check_random(program: ExportedProgram) -> Iterator[Finding]:
    """Operators that draw random numbers in eval mode."""
    for node in program.graph.nodes:
        if failures.draws(node):
            reason = "it draws random numbers although the model is in eval mode"
            yield Finding("error", str(node.target), operators.module_of(node), reason, "draw only `if self.training`")


def _check_undelegated(
    program: ExportedProgram, tagged: ExportedProgram, reasons: dict[str, str], refused: Refused
) -> Iterator[Finding]:
    """The operators of the edge program in no partition, grouped by module and reason."""
    modules, macs = operators.modules(program), operators.macs_of(program)
    total = max(sum(macs.values()), 1)
    grouped: dict[tuple[str, str, str], list[int | None]] = {}
    for node in tagged.graph.nodes:
        name = str(node.target)
        if node.op != "call_function" or "delegation_tag" in node.meta or name.startswith("<built-in"):
            continue
        if operator_kinds.is_free(operator_kinds.plain_name(name)):
            continue
        number = operators.number_of(node)
        module = modules.get(number, "") if number is not None else ""
        key = (operator_kinds.plain_name(name), module, reasons.get(node.name) or _infer_reason(node, refused))
        grouped.setdefault(key, []).append(number)
    for (operator, module, reason), numbers in grouped.items():
        multiplies = operator.split(".")[1] in _MULTIPLY  # data movement for it does not count
        share = 100.0 * sum(macs.get(n, 0) for n in set(numbers) if n is not None) / total if multiplies else 0.0
        severity: Severity = "warning" if share else "note"
        remedy = remedies.remedy(operator)
        yield Finding(severity, operator, module, reason, remedy, len(numbers), share)


def _infer_reason(node: fx.Node, refused: Refused) -> str:
    """A reason if the partitioner gives none."""
    values = [source.meta.get("val") for source in node.all_input_nodes] + [node.meta.get("val")]
    types = {value.dtype for value in values if isinstance(value, Tensor)}
    integers = sorted(str(t).removeprefix("torch.") for t in types if not t.is_floating_point)
    if integers:
        return f"it reads or writes {', '.join(integers)}, and the backend computes in floating point"
    computed = sorted(refused[dtype] for dtype in types if dtype in refused)
    return (
        f"it computes in {', '.join(computed)}"
        if computed
        else "the backend does not have this operator, or not in this form"
    )


@contextmanager
def _record_reasons() -> Iterator[dict[str, str]]:
    """Inside, record why executorch's partitioners reject a node, by its name: they log it."""
    from executorch.exir.backend.utils import WhyNoPartition

    reasons: dict[str, str] = {}
    stock = WhyNoPartition.__call__

    def record(self: Any, node: fx.Node, reason: str) -> None:
        if reason != "invalid dtype":  # `_infer_reason` names the type
            reasons.setdefault(node.name, reason)

    WhyNoPartition.__call__ = record
    try:
        yield reasons
    finally:
        WhyNoPartition.__call__ = stock
