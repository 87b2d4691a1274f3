"""Static 8-bit quantization through ExecuTorch's own quantizers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from edgetune.capture import failures
from edgetune.capture.computed import fold_weights
from edgetune.capture.dynamic import free_sizes
from edgetune.capture.fast_path import slow_path
from edgetune.capture.positional import Positional
from edgetune.capture.recorded import clamp_bounds
from edgetune.capture.repairs import depthwise
from edgetune.capture.reparameterize import reparameterize
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.inputs import Inputs, rows_of, tensors_of
from edgetune.core.quiet import silence_libraries
from edgetune.quant.bias import correct_biases
from edgetune.quant.observers import OBSERVERS, Observer, output_error, set_rule
from edgetune.quant.quantizers import OWN, fast_annotation, quantizer_for


def quantize_static(
    model: nn.Module,
    inputs: Inputs,
    batches: Iterable[Inputs],
    *,
    per_channel: bool,
    observer: Observer | Literal["auto"] = "minmax",
    bias_correction: bool = False,
    skip: frozenset[str] = frozenset(),
    target: str = "xnnpack",
) -> tuple[fx.GraphModule, dict[Observer, float]]:
    """A graph of `model`, in eval mode, that rounds weights and activations to int8 with scales from `batches`.

    Takes the tensors of `inputs` by position, any number of rows. Weights have one scale per output channel, or
    one in all without `per_channel`. The layers called `skip` stay in floating point, which only XNNPACK's quantizer
    can do. A target's own quantizer takes and returns a graph for one row: it does not support dynamic sizes.
    `auto` calibrates on all but the last quarter of the batches and takes the observer of the least error on those;
    the errors of all come with the graph, the least first.
    Raises `EdgetuneError` (exit code 5) if the model cannot be captured with a free batch size.
    """
    auto = observer == "auto"
    quantizer = quantizer_for(
        target, per_channel=per_channel, observer="mse" if observer == "auto" else observer, skip=skip
    )
    any_rows = target not in OWN
    several = auto or bias_correction
    errors: dict[Observer, float] = {}
    with silence_libraries(), torch.no_grad():
        prepared = _prepare(_fuse_branches(model, inputs, skip), inputs, quantizer, skip, any_rows=any_rows)
        calibration = [tensors_of(batch) for batch in batches] if several else map(tensors_of, batches)
        held_apart = calibration[-max(1, len(calibration) // 4) :] if isinstance(calibration, list) else []
        fitted = calibration[: -len(held_apart)] if auto and len(calibration) > 1 else calibration  # type: ignore
        seen = 0
        for tensors in fitted:
            single = (rows_of(tensors, row, row + 1) for row in range(len(tensors[0])))
            for part in [tensors] if any_rows else single:
                prepared(*part)
            seen += 1
        if seen == 0:
            raise EdgetuneError("int8 got no calibration batch", action="give the sample batches", exit_code=Exit.DATA)
        if auto:
            errors = _compare_observers(prepared, held_apart)
            set_rule(prepared, next(iter(errors)))
        converted = _convert(copy.deepcopy(prepared) if several else prepared)
        if bias_correction:
            correct_biases(prepared, converted, calibration)
    _drop_unused(converted)
    return converted, errors


def _compare_observers(prepared: fx.GraphModule, batches: Sequence[tuple[Tensor, ...]]) -> dict[Observer, float]:
    """The relative squared error of the outputs by each observer, on these batches; the least first."""
    errors: dict[Observer, float] = {}
    for observer in OBSERVERS:
        set_rule(prepared, observer)
        errors[observer] = output_error(prepared, _convert(copy.deepcopy(prepared)), batches)
    return dict(sorted(errors.items(), key=lambda pair: pair[1]))


def _convert(prepared: fx.GraphModule) -> fx.GraphModule:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    converted: fx.GraphModule = convert_pt2e(prepared)
    return converted


def _drop_unused(graph_module: fx.GraphModule) -> None:
    """Delete the float weights that the folded int8 ones replaced."""
    used = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    tensors = [*graph_module.named_parameters(), *graph_module.named_buffers()]
    for name in [name for name, _ in tensors if name not in used]:
        parent, _, own = name.rpartition(".")
        delattr(graph_module.get_submodule(parent), own)


def _fuse_branches(model: nn.Module, inputs: Inputs, skip: frozenset[str]) -> nn.Module:
    """The model with parallel branches fused as in an export, unless that removes a layer in `skip`.

    Unfused, each branch would be rounded separately.
    """
    fused, report = reparameterize(model, inputs)
    complete = skip <= {name for name, _ in fused.named_modules()}
    return fused if report.branches and complete else model


def _prepare(model: nn.Module, inputs: Inputs, quantizer: Any, skip: frozenset[str], *, any_rows: bool) -> Any:
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    program = Positional(model, inputs).eval()
    example = tuple(_two_rows(tensor) if any_rows else tensor[:1].cpu() for tensor in tensors_of(inputs))
    free = (free_sizes(example, torch.export.Dim("batch", min=1, max=65536)),) if any_rows else None
    try:
        with slow_path(program):
            captured = torch.export.export(program, example, dynamic_shapes=free, strict=False)
    except Exception as error:  # torch.export raises dozens of types
        raise failures.capture_error(program, example, error) from error
    graph_module: Any = captured.module(check_guards=False)
    _keep_dims(graph_module)
    if any_rows:
        _unify_clamps(graph_module)
        depthwise.split_graph(graph_module.graph, {n.name for n in graph_module.graph.nodes if n.op == "get_attr"})
    fold_weights(graph_module, skip)
    with fast_annotation():
        return prepare_pt2e(graph_module, quantizer)


def _keep_dims(graph_module: fx.GraphModule) -> None:
    """Write a mean over images as one that keeps their dims, and a flatten.

    XNNPACK takes no other between two roundings: it would compute the mean in floating point, where chance decides
    which way a half goes, and a mean of a few whole numbers is often a half.
    """
    aten, graph = torch.ops.aten, graph_module.graph
    for node in list(graph.nodes):
        if node.target != aten.mean.dim or node.kwargs or (len(node.args) > 2 and node.args[2]):
            continue
        value = node.args[0].meta["val"]
        if value.dim() != 4 or sorted(dim % 4 for dim in node.args[1] or ()) != [2, 3]:
            continue
        with graph.inserting_before(node):
            mean = graph.call_function(aten.mean.dim, (node.args[0], [2, 3], True))
            flat = graph.call_function(aten.flatten.using_ints, (mean, 1))
        mean.meta, flat.meta = {**node.meta, "val": value.mean((2, 3), keepdim=True)}, dict(node.meta)
        node.replace_all_uses_with(flat)
        graph.erase_node(node)
    graph_module.recompile()


def _unify_clamps(graph_module: fx.GraphModule) -> None:
    """Write `F.relu6`, `clamp` and `clip` as `hardtanh`, or as `relu`.

    Of clamps XNNPACK's quantizer knows only these two: it gives them one scale before and after, or fuses them into
    the layer. Others get two scales, and XNNPACK's clamp takes the integers of the first scale for those of the second.
    """
    aten = torch.ops.aten
    for node in graph_module.graph.nodes:
        bounds = clamp_bounds(node)
        if bounds is None:
            continue
        in_place = str(node.target).removesuffix(".default").endswith("_")
        if bounds == (0.0, torch.finfo(torch.float32).max):
            node.target = aten.relu_.default if in_place else aten.relu.default
            node.args = node.args[:1]
        else:
            node.target = aten.hardtanh_.default if in_place else aten.hardtanh.default
            node.args = (node.args[0], *bounds)
        node.kwargs = {}
    graph_module.recompile()


def _two_rows(tensor: Tensor) -> Tensor:
    """At least two rows: a batch of one would be taken for a constant."""
    rows = tensor.detach().cpu().contiguous()
    return rows[:2] if rows.shape[0] > 1 else torch.cat([rows, rows])
