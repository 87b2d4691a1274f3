"""The memory plan of a program: ways to lay its tensors out are tried, and the smallest arena is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.export.graph_signature import ExportGraphSignature

from edgetune.export.training.plan import in_order, largest_first, specs_of

_MOVED = ", reordered"

Algorithm = Callable[..., Any]  # executorch's: (alignment, specs, graph module, signature, padding) -> MemoryAlgoResult


@dataclass(frozen=True)
class Planned:
    """Arena bytes of every way that was tried, by its name, and the way that was taken."""

    taken: str
    tried_bytes: dict[str, int]

    @property
    def bytes(self) -> int:
        """Of the way that was taken."""
        return self.tried_bytes[self.taken]


def smallest(*, holds_io: bool = True) -> Any:
    """executorch's planning pass with several algorithms and two orders; `plans` lists what it did, method by method.

    Tried are executorch's greedy plan, the same without tensors that overlap in time within one range, and the
    largest first (`order.placed`); each with the operators as they were written, and in the order that keeps the
    least alive. `holds_io`: whether the arena also holds the inputs and outputs of a method.
    """
    from executorch.exir.memory_planning import MemoryPlanningAlgorithmSuite
    from executorch.exir.passes import MemoryPlanningPass

    ways = _ways()

    class Smallest(MemoryPlanningPass):  # type: ignore[misc]
        def __init__(self) -> None:
            suite = MemoryPlanningAlgorithmSuite(ways)
            super().__init__(suite, alloc_graph_input=holds_io, alloc_graph_output=holds_io)
            self.plans: list[Planned] = []

        def run(self, graph_module: fx.GraphModule, graph_signature: ExportGraphSignature | None = None) -> Any:
            super()._set_alloc_node_spec(graph_module)
            tried = self._tried(graph_module, graph_signature)
            written = min(tried.values())
            if graph_signature is not None and _may_move(graph_module, graph_signature):
                nodes = list(graph_module.graph.nodes)
                in_order(graph_module, graph_signature)
                moved = self._tried(graph_module, graph_signature)
                if min(moved.values()) >= written:
                    _put_back(graph_module, nodes)
                tried |= {name + _MOVED: size for name, size in moved.items()}
            self.plans.append(Planned(min(tried, key=lambda name: tried[name]), tried))
            return super().run(graph_module, graph_signature)

        def _set_alloc_node_spec(self, graph_module: fx.GraphModule) -> None:
            """Done above: the order needs them."""

        def _tried(self, graph_module: fx.GraphModule, signature: ExportGraphSignature | None) -> dict[str, int]:
            return _sizes(ways, graph_module, signature, self.alignment, holds_io)

    return Smallest()


def _ways() -> list[Algorithm]:
    """The algorithms, each under a name of its own, by which executorch tells them apart."""
    from executorch.exir.memory_planning import greedy

    def greedy_apart(
        alignment: int, specs: Any, graph_module: fx.GraphModule, signature: Any, extra_padding: int = 0
    ) -> Any:
        return greedy(alignment, specs, graph_module, signature, extra_padding, allow_overlapping_allocations=False)

    return [greedy, greedy_apart, largest_first]


def _sizes(
    ways: Sequence[Algorithm],
    graph_module: fx.GraphModule,
    signature: ExportGraphSignature | None,
    alignment: int,
    holds_io: bool,
) -> dict[str, int]:
    """Arena bytes of each way with the operators in their present order. Leaves no trace on the tensors."""
    from executorch.exir.memory_planning import (
        _contains_xnnpack_delegate,
        collect_specs_from_nodes,
        update_all_tensors_lifetime,
    )

    touched = update_all_tensors_lifetime(graph_module, signature)
    specs = list(
        collect_specs_from_nodes(
            graph_module.graph.nodes,
            signature,
            do_assertion=False,
            ignore_graph_input=not holds_io,
            ignore_graph_output=not holds_io,
        )
    )
    padding = 64 if _contains_xnnpack_delegate(graph_module) else 0  # as executorch's own planning adds
    found = {way.__name__: sum(way(alignment, specs, graph_module, signature, padding).bufsizes) for way in ways}
    for spec in touched:
        spec.lifetime = [None, None]
    return found


def _may_move(graph_module: fx.GraphModule, signature: ExportGraphSignature) -> bool:
    """Whether operators may change places: nothing is written but new tensors of fixed sizes, nothing branches."""
    from executorch.exir.memory_planning import _is_inplace_node
    from executorch.exir.tensor import TensorShapeDynamism

    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        return False
    if any(isinstance(inner, fx.GraphModule) for inner in graph_module.modules() if inner is not graph_module):
        return False
    for node in graph_module.graph.nodes:
        fixed = all(getattr(s, "shape_dynamism", None) == TensorShapeDynamism.STATIC for s in specs_of(node))
        if _is_inplace_node(node) or (node.op == "call_function" and not fixed):
            return False
    return True


def _put_back(graph_module: fx.GraphModule, nodes: Sequence[fx.Node]) -> None:
    output = graph_module.graph.output_node()
    for node in nodes:
        if node.op not in ("placeholder", "output"):
            output.prepend(node)
    graph_module.recompile()
