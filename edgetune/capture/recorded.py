"""The operators of one forward as a graph, recorded while a model runs on example inputs.

Unlike an exported program it needs no model without branches on values: it is what was computed on these inputs, with
composite operators such as linear and attention whole. Nodes for parameters are known by their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgetune.capture.fast_path import slow_path
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs, call, device_of, first_rows, tensors_in, to_device
from edgetune.core.modes import preserve_buffers, preserve_state


@dataclass(frozen=True)
class Recording:
    """The graph, and the names of each node that is a parameter, or a buffer: several if layers share it.

    A parameter that is read several times may have several nodes.
    """

    graph: fx.Graph
    names: Mapping[fx.Node, tuple[str, ...]]
    buffers: Mapping[fx.Node, tuple[str, ...]]

    def readers(self, parameter: fx.Node) -> list[fx.Node]:
        """The operators that read the parameter of this node."""
        names = self.names[parameter]
        return [user for node, others in self.names.items() if others == names for user in node.users]

    def parameter(self, node: object) -> str | None:
        """The name of the parameter that a node is, if one layer alone has it and one operator alone reads it."""
        if not isinstance(node, fx.Node) or len(self.names.get(node, ())) != 1 or len(self.readers(node)) != 1:
            return None
        return self.names[node][0]

    def layer(self, node: object) -> str | None:
        """The name of the layer whose weight a node is, under the same conditions."""
        name = self.parameter(node)
        layer, _, own = (name or "").rpartition(".")
        return layer if name is not None and own == "weight" else None


def record(model: nn.Module, inputs: Inputs) -> Recording:
    """Run the model in evaluation mode on the first rows of `inputs`, and record its operators.

    Raises `EdgetuneError` if it does not run on them, or they have no rows.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs = to_device(first_rows(inputs), device_of(model))
    if not any(tensor.numel() for tensor in tensors_in(inputs)):
        raise EdgetuneError("the sample has no rows", action="pass et.Sample(inputs, batches) with rows")

    def run() -> list[Tensor]:
        return list(tensors_in(call(model, inputs)))

    with preserve_state(model), preserve_buffers(model), slow_path(model), torch.no_grad():
        try:
            traced = make_fx(run, pre_dispatch=True, _error_on_data_dependent_ops=False)()
        except Exception as error:  # whatever a forward or the tracer raises
            raise EdgetuneError(
                f"the operators of {type(model).__name__} cannot be recorded ({type(error).__name__}: {error})",
                action="check that model(example inputs) runs, and returns tensors",
            ) from error
    own = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return Recording(traced.graph, *(_nodes_of(traced, named) for named in own))


def _nodes_of(traced: fx.GraphModule, named: Iterable[tuple[str, Tensor]]) -> dict[fx.Node, tuple[str, ...]]:
    """The names of each node that is one of these tensors."""
    names: dict[int, list[str]] = {}
    for name, tensor in named:
        names.setdefault(id(tensor), []).append(name)
    constants = ((node, getattr(traced, str(node.target))) for node in traced.graph.nodes if node.op == "get_attr")
    return {node: tuple(names[id(value)]) for node, value in constants if id(value) in names}


def operator_name(node: fx.Node) -> str:
    """`mul` for `aten.mul.Tensor`, `relu` for `aten.relu_.default`; of other nodes their kind."""
    packet: Any = getattr(node.target, "overloadpacket", None)
    if packet is not None:
        return str(packet.__name__).removesuffix("_")
    return str(getattr(node.target, "__name__", node.op)) if node.op == "call_function" else node.op


def shape_of(node: fx.Node) -> torch.Size:
    """The shape of the tensor that a node computes; of other values that of a number."""
    shape: torch.Size = getattr(node.meta.get("val"), "shape", torch.Size())
    return shape


_BOUNDS = {
    "hardtanh": ("min_val", "max_val"), "clamp": ("min", "max"), "clip": ("min", "max"), "clamp_min": ("min",),
    "clamp_max": ("max",), "relu6": (),
}  # fmt: skip


def clamp_bounds(node: fx.Node) -> tuple[float, float] | None:
    """Between which numbers a node clamps values in floating point; `None` for other nodes."""
    kind = operator_name(node)
    if kind not in _BOUNDS or not node.meta["val"].is_floating_point():
        return None
    low_name, high_name = _BOUNDS["hardtanh" if kind == "hardtanh" else "clamp"]
    given: dict[str, Any] = {"hardtanh": {low_name: -1, high_name: 1}, "relu6": {"min": 0, "max": 6}}.get(kind, {})
    given = {**given, **node.kwargs, **dict(zip(_BOUNDS[kind], node.args[1:], strict=False))}
    low, high = given.get(low_name), given.get(high_name)
    if not all(isinstance(bound, int | float | None) for bound in (low, high)):
        return None
    largest = torch.finfo(torch.float32).max
    return -largest if low is None else float(low), largest if high is None else float(high)
