"""Capture a model and its loss as one graph: forward, loss, and the backward of trainable parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from edgetune.capture import failures
from edgetune.capture.repairs.attention import attention
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.inputs import Inputs, call, logits_of, tensors_of
from edgetune.export.pass_cache import fast_decompositions
from edgetune.export.training import layers, passes
from edgetune.lean.frozen import remove_hooks
from edgetune.lean.frozen_ops import pad_input
from edgetune.sparse.sliced import Sliced

Loss = Callable[[Tensor, Tensor], Tensor]
CHILD = "model"  # the name of the user's model in the wrappers


class LogitsModule(nn.Module):
    """The model as a module of positional inputs that returns logits."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(inputs) if isinstance(inputs, dict) else ()

    def logits(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The logits for positional inputs."""
        return logits_of(call(self.model, dict(zip(self.names, tensors)) if self.names else tensors))  # noqa: B905

    def forward(self, *tensors: Tensor) -> Any:
        """The logits."""
        return self.logits(tensors)


class LossModule(LogitsModule):
    """The model with its loss: takes the inputs by position, then the labels."""

    def __init__(self, model: nn.Module, inputs: Inputs, loss: Loss) -> None:
        super().__init__(model, inputs)
        self.loss = loss

    def forward(self, *tensors: Tensor) -> Any:
        """The loss, a scalar, and the logits."""
        logits = self.logits(tensors[:-1])
        return self.loss(logits, tensors[-1]), logits.detach()


class SplitLayer(nn.Module):
    """A `Sliced` layer as two products: one with the frozen rest, a constant; and one with the slice, which trains."""

    def __init__(self, layer: Sliced) -> None:
        super().__init__()
        self.base, self.slice, self.dim = layer.base, layer.slice, layer.dim
        self.register_buffer("indices", layer.indices)
        weight: Tensor = layer.base.weight  # type: ignore[assignment]
        weight.data.index_fill_(layer.dim, layer.indices, 0.0)
        # source of each output channel: its row of the slice, or the row of zeros after it
        sources = torch.full((weight.shape[0],), len(layer.indices), dtype=torch.int64)
        if layer.dim == 0:
            sources[layer.indices] = torch.arange(len(layer.indices))
        self.register_buffer("sources", sources)
        groups = getattr(layer.base, "groups", 1)
        if groups > 1:
            each_out, each_in = weight.shape[0] // groups, weight.shape[1]
            chosen = layer.indices[::each_out] // each_out
            self.register_buffer("inputs", (chosen[:, None] * each_in + torch.arange(each_in)).flatten())

    def forward(self, *args: Any) -> Tensor:
        """The output of the sliced layer."""
        with _AddSliceProduct(self):
            return self.base(*args)  # type: ignore[no-any-return]

    def scatter(self, rows: Tensor, dim: int) -> Tensor:
        """Put the output channels `(.., k, ..)` at `dim` among zeros: `(.., out, ..)`."""
        zeros = torch.zeros_like(rows.narrow(dim, 0, 1))
        return torch.cat([rows, zeros], dim).index_select(dim, self.sources)  # type: ignore[arg-type]


class _AddSliceProduct(TorchFunctionMode):
    """Adds the slice's product to each product that the base layer computes, with the same padding."""

    def __init__(self, layer: SplitLayer) -> None:
        super().__init__()
        self.layer = layer

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        layer, kwargs = self.layer, kwargs or {}
        if func is functional.linear:
            return func(*args, **kwargs) + self._linear(*args, **kwargs)
        if func in (functional.conv1d, functional.conv2d, functional.conv3d):
            return func(*args, **kwargs) + self._convolution(func, layer, *args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        layer = self.layer
        if layer.dim == 1:
            return functional.linear(input.index_select(-1, layer.indices), layer.slice)  # type: ignore[arg-type]
        return layer.scatter(functional.linear(input, layer.slice), -1)

    def _convolution(
        self, func: Any, layer: SplitLayer, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
        padding: Any = 0, dilation: Any = 1, groups: int = 1,
    ) -> Tensor:  # fmt: skip
        input, stride, padding, dilation = pad_input(input, weight, stride, padding, dilation)
        if layer.dim == 1:
            chosen = input.index_select(-1 - len(stride), layer.indices)  # type: ignore[arg-type]
            return func(chosen, layer.slice, None, stride, padding, dilation)  # type: ignore[no-any-return]
        if groups > 1:
            input = input.index_select(-1 - len(stride), layer.inputs)  # type: ignore[arg-type]
            groups = layer.slice.shape[0] * groups // weight.shape[0]
        rows = func(input, layer.slice, None, stride, padding, dilation, groups)
        return layer.scatter(rows, -1 - len(stride))


@dataclass(frozen=True)
class JointGraph:
    """Forward and backward in one graph, and the gradient of each parameter."""

    program: ExportedProgram
    gradients: dict[str, str]  # parameter's name in the program -> output node


def prepare_copy(model: nn.Module) -> nn.Module:
    """A copy of the model on the CPU, in eval mode, without hooks, and with its sliced layers split."""
    copied = copy.deepcopy(model).cpu().eval()
    remove_hooks(copied)
    for name, module in list(copied.named_modules(remove_duplicate=False)):
        if isinstance(module, Sliced):
            if not name:
                return SplitLayer(module)
            parent, _, key = name.rpartition(".")
            setattr(copied.get_submodule(parent), key, SplitLayer(module))
    for module in copied.modules():
        module._state_dict_hooks.clear()  # keys must be the parameters' names
    if hasattr(getattr(copied, "config", None), "use_cache"):
        copied.config.use_cache = False  # type: ignore[union-attr]
    return copied


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name. Raises if there are none, or if one has two names."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    every = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    if not parameters:
        raise EdgetuneError("nothing in this model is trainable", action="choose a scheme first", exit_code=Exit.EXPORT)
    tied = sorted(set(every) - set(parameters))
    if tied:
        raise EdgetuneError(
            f"{tied[0]} is trainable and tied to another layer's parameter",
            action="freeze it, or untie it: layer.weight = nn.Parameter(layer.weight.clone())",
            exit_code=Exit.EXPORT,
        )
    return parameters


def capture_joint(model: nn.Module, inputs: Inputs, labels: Tensor, loss: Loss) -> JointGraph:
    """Capture forward, loss and backward of a model from `prepare_copy` for exactly these shapes."""
    from torch.export.exported_program import _decompose_exported_program

    program = _capture(LossModule(model, inputs, loss), (*tensors_of(inputs), labels))
    wanted = {f"{CHILD}.{name}" for name in trainable_parameters(model)}
    for node in program.graph.nodes:
        target = program.graph_signature.inputs_to_parameters.get(node.name)
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor) and value.requires_grad != (target in wanted):
            node.meta["val"] = value.detach().requires_grad_(target in wanted)
    try:
        with torch.enable_grad(), _hide_quantization(program, wanted) as stand_ins:
            both = _decompose_exported_program(
                program,
                cia_to_decomp={},
                python_decomp_table=passes.decompositions(),
                joint_loss_index=0,
                decompose_custom_triton_ops=False,
            )
            for node in both.graph.nodes:
                node.target = stand_ins.get(node.target, node.target)
    except EdgetuneError:
        raise
    except Exception as error:  # autograd under a tracer raises any type
        cause = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        raise EdgetuneError(
            f"the backward pass cannot be captured: {cause}",
            action="freeze the named module, or replace its operator",
            exit_code=Exit.EXPORT,
        ) from error
    gradients = {
        str(spec.target): spec.arg.name
        for spec in both.graph_signature.output_specs
        if spec.kind is OutputKind.GRADIENT_TO_PARAMETER
    }
    unused = sorted(wanted - set(gradients))
    if unused:
        raise EdgetuneError(
            f"{unused[0].removeprefix(CHILD + '.')} is trainable, but the loss does not depend on it",
            action="freeze it",
            exit_code=Exit.EXPORT,
        )
    return JointGraph(both, gradients)


@contextmanager
def _hide_quantization(program: ExportedProgram, wanted: set[str]) -> Iterator[dict[Any, Any]]:
    """Hide the operators of quantized layers from autograd, which would decompose them: the backend fuses them.

    Yields stand-in -> original. Raises if a gradient would have to pass through one.
    """
    trained = {n for n, t in program.graph_signature.inputs_to_parameters.items() if t in wanted}
    needs_gradient: set[fx.Node] = set()
    nodes = []
    for node in program.graph.nodes:
        if node.name in trained or any(source in needs_gradient for source in node.all_input_nodes):
            needs_gradient.add(node)
        if node.op == "call_function" and str(node.target).startswith("torchao."):
            nodes.append(node)
            if node in needs_gradient:
                raise EdgetuneError(
                    "a gradient would have to pass through a quantized layer",
                    action="quantize only layers before the first trainable one",
                    exit_code=Exit.EXPORT,
                )
    stand_ins: dict[Any, Any] = {}
    with torch.library._scoped_library("edgetune_training", "FRAGMENT") as library:
        for original in {node.target for node in nodes}:
            name = str(original).replace(".", "_")
            _, _, arguments = str(original._schema).partition("(")
            library.define(f"{name}({arguments}")
            library.impl(name, original, "CompositeExplicitAutograd")
            library._register_fake(name, original)
            stand_ins[getattr(torch.ops.edgetune_training, name).default] = original
        by_original = {original: stand_in for stand_in, original in stand_ins.items()}
        for node in nodes:
            node.target = by_original[node.target]
        program.graph_module.recompile()
        yield stand_ins


def capture_forward(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    """Capture only the forward pass of a model from `prepare_copy`."""
    return _capture(LogitsModule(model, inputs), tensors_of(inputs))


def _capture(module: nn.Module, tensors: tuple[Tensor, ...]) -> ExportedProgram:
    """Export to ATen operators, with attention decomposed and quantized weights as plain tensors."""
    tensors = tuple(t.detach().cpu().contiguous() for t in tensors)
    try:
        with fast_decompositions():
            program = torch.export.export(module, tensors, strict=False)
            decomposed: ExportedProgram = program.run_decompositions(
                {torch.ops.aten.scaled_dot_product_attention.default: attention}
            )
        layers.fuse_padding(decomposed)
        return decomposed
    except Exception as error:  # torch.export raises any type
        raise failures.capture_error(module, tensors, error) from error
