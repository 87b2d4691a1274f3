"""Static 8-bit quantization through ExecuTorch's own quantizers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.inputs import Inputs, rows_of, tensors_of
from edgetune.core.quiet import quiet
from edgetune.export import failures, operators
from edgetune.export.computed import fold_weights
from edgetune.export.fast_path import slow_path
from edgetune.export.lower import Positional
from edgetune.export.reparameterize import reparameterize
from edgetune.export.speed import fast_annotation
from edgetune.export.targets.target import Target
from edgetune.export.targets.xnnpack import XNNPACK

_NOTE = "quantization_annotation"


def quantize_static(
    model: nn.Module,
    inputs: Inputs,
    batches: Iterable[Inputs],
    *,
    per_channel: bool,
    skip: frozenset[str] = frozenset(),
    target: Target = XNNPACK,
) -> fx.GraphModule:
    """A graph of `model`, in eval mode, that rounds weights and activations to int8 with scales from `batches`.

    Takes the tensors of `inputs` by position, any number of rows. Weights have one scale per output channel, or
    one in all without `per_channel`. The layers called `skip` stay in floating point, which only XNNPACK's quantizer
    can do. A target's own quantizer gets, and gives, a graph for one row: it does not know sizes that may differ.
    Raises `EdgetuneError` (exit code 5) where the model cannot be captured with a free batch size.
    """
    quantizer = _of(target, per_channel=per_channel, skip=skip)
    any_rows = target.quantizer is None
    with quiet(), torch.no_grad():
        prepared = _prepared(_fused(model, inputs, skip), inputs, quantizer, skip, any_rows=any_rows)
        seen = 0
        for batch in batches:
            tensors = tensors_of(batch)
            single = (rows_of(tensors, row, row + 1) for row in range(len(tensors[0])))
            for part in [tensors] if any_rows else single:
                prepared(*part)
            seen += 1
        if seen == 0:
            raise EdgetuneError("int8 got no calibration batch", action="give the sample batches", exit_code=Exit.DATA)
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        converted: fx.GraphModule = convert_pt2e(prepared)
    _drop_unused(converted)
    return converted


def _drop_unused(graph_module: fx.GraphModule) -> None:
    """Take away the float weights that the folded int8 ones replaced, which the module still holds."""
    used = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    tensors = [*graph_module.named_parameters(), *graph_module.named_buffers()]
    for name in [name for name, _ in tensors if name not in used]:
        parent, _, own = name.rpartition(".")
        delattr(graph_module.get_submodule(parent), own)


def _fused(model: nn.Module, inputs: Inputs, skip: frozenset[str]) -> nn.Module:
    """The model with its parallel branches made one, as an export would make them: each branch would be rounded
    by itself. Where fusing takes a layer away that is to be skipped, the model as it is.
    """
    fused, report = reparameterize(model, inputs)
    kept = skip <= {name for name, _ in fused.named_modules()}
    return fused if report.branches and kept else model


def _prepared(model: nn.Module, inputs: Inputs, quantizer: Any, skip: frozenset[str], *, any_rows: bool) -> Any:
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    program = Positional(model, inputs).eval()
    example = tuple(_two_rows(tensor) if any_rows else tensor[:1].cpu() for tensor in tensors_of(inputs))
    free = (tuple({0: torch.export.Dim("batch", min=1, max=65536)} for _ in example),) if any_rows else None
    try:
        with slow_path(program):
            captured = torch.export.export(program, example, dynamic_shapes=free, strict=False)
    except Exception as error:  # torch.export raises dozens of types
        raise failures.not_captured(program, example, error) from error
    graph_module: Any = captured.module(check_guards=False)
    _keep_dims(graph_module)
    fold_weights(graph_module, skip, _module)
    with fast_annotation():
        return prepare_pt2e(graph_module, quantizer)


def _keep_dims(graph_module: fx.GraphModule) -> None:
    """Write a mean over pictures as one that keeps their dims, and a flatten.

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
            kept = graph.call_function(aten.mean.dim, (node.args[0], [2, 3], True))
            flat = graph.call_function(aten.flatten.using_ints, (kept, 1))
        kept.meta, flat.meta = {**node.meta, "val": value.mean((2, 3), keepdim=True)}, dict(node.meta)
        node.replace_all_uses_with(flat)
        graph.erase_node(node)
    graph_module.recompile()


def _of(target: Target, *, per_channel: bool, skip: frozenset[str]) -> Any:
    """The quantizer of a target: its own, or XNNPACK's."""
    if target.quantizer is None:
        with quiet():
            return _xnnpack(per_channel=per_channel, skip=skip)
    if skip:
        raise EdgetuneError(f"int8 for target {target.name} takes no skip", got=sorted(skip), action="leave it out")
    target.partitioners()  # raises where the target is not installed
    with quiet():
        return target.quantizer(target, per_channel)


def _xnnpack(*, per_channel: bool, skip: frozenset[str]) -> Any:
    """ExecuTorch's quantizer, with one scale after a layer and its clamp instead of one before and one after.

    The stock one knows a layer and a relu as one, but not relu6: it spreads the 8 bits of such a layer over values
    that the clamp then cuts off, which cost EfficientNet-Lite0 a tenth of its predictions. XNNPACK runs both as one.
    """
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as stock
    from torchao.quantization.pt2e.observer import MinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation

    class Fused(stock.XNNPACKQuantizer):  # type: ignore[misc]
        def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
            model = super().transform_for_annotation(model)
            _whole_constants(model)
            return model

        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            model = super().annotate(model)
            for node in model.graph.nodes:
                layer = node.args[0] if node.target in clamps else None
                if not isinstance(layer, fx.Node) or layer.target not in layers or len(layer.users) != 1:
                    continue
                noted = layer.meta.get(_NOTE)
                if noted is not None:
                    node.meta[_NOTE] = QuantizationAnnotation(output_qspec=noted.output_qspec, _annotated=True)
                    noted.output_qspec = None
            return model

    aten = torch.ops.aten
    clamps = {aten.hardtanh.default, aten.hardtanh_.default}
    layers = {aten.conv1d.default, aten.conv2d.default, aten.linear.default}
    config = stock.get_symmetric_quantization_config(is_per_channel=per_channel)
    # least and largest value: the stock histogram takes minutes where this takes seconds
    spec = replace(config.input_activation, observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-12))
    quantizer = Fused().set_global(replace(config, input_activation=spec, output_activation=spec))
    return quantizer.set_filter_function(lambda node: _module(node) not in skip)


def _whole_constants(graph_module: fx.GraphModule) -> None:
    """Give constants that were numbers the type of what they are added to: the quantizer makes floats of all.

    An index plus 0, as transformers computes for its masks, would be a float, and a float is no index.
    """
    for node in graph_module.graph.nodes:
        constant = (
            getattr(graph_module, node.target, None) if node.op == "get_attr" and "." not in node.target else None
        )
        if not isinstance(constant, Tensor) or not node.target.startswith("_tensor_constant"):
            continue
        types = {getattr(user.meta.get("val"), "dtype", None) for user in node.users}
        if len(types) == 1 and (dtype := types.pop()) is not None and not dtype.is_floating_point:
            setattr(graph_module, node.target, constant.to(dtype))


def _module(node: fx.Node) -> str:
    """The module that a node of a captured `Positional` comes from, in the user's own names."""
    stack = node.meta.get("nn_module_stack") or {}
    return operators.shorten(str(list(stack.values())[-1][0])) if stack else ""


def _two_rows(tensor: Tensor) -> Tensor:
    """At least two rows: a batch of one would be taken for a constant."""
    rows = tensor.detach().cpu().contiguous()
    return rows[:2] if rows.shape[0] > 1 else torch.cat([rows, rows])
