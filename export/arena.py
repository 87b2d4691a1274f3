"""Plan a program's memory: try several algorithms and orders of operators, and take the smallest arena."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.export.graph_signature import ExportGraphSignature

from edgetune.export.training.plan import largest_first, reorder, specs_of

_REORDERED = ", reordered"

Algorithm = Callable[..., Any]  # executorch's: (alignment, specs, graph module, signature, padding) -> MemoryAlgoResult


@dataclass(frozen=True)
class ArenaPlan:
    """The planning that was chosen for a method, and the arena bytes of every one that was tried, by name."""

    chosen: str
    tried_bytes: dict[str, int]


def plan_smallest_arena(*, io_in_plan: bool = True) -> Any:
    """executorch's planning pass with several algorithms and two orders; its `plans` has one plan for each method.

    Tried are executorch's greedy plan, the same without overlapping allocations, and the largest tensor first
    (`order.place_tensors`); each in the written order of operators and in the order that keeps the least memory
    alive. `io_in_plan`: whether the arena also holds the inputs and outputs of a method.
    """
    from executorch.exir.memory_planning import MemoryPlanningAlgorithmSuite
    from executorch.exir.passes import MemoryPlanningPass

    algorithms = _algorithms()

    class Smallest(MemoryPlanningPass):  # type: ignore[misc]
        def __init__(self) -> None:
            suite = MemoryPlanningAlgorithmSuite(algorithms)
            super().__init__(suite, alloc_graph_input=io_in_plan, alloc_graph_output=io_in_plan)
            self.plans: list[ArenaPlan] = []

        def run(self, graph_module: fx.GraphModule, graph_signature: ExportGraphSignature | None = None) -> Any:
            super()._set_alloc_node_spec(graph_module)
            tried = self._try_all(graph_module, graph_signature)
            written = min(tried.values())
            if graph_signature is not None and _may_reorder(graph_module, graph_signature):
                nodes = list(graph_module.graph.nodes)
                reorder(graph_module, graph_signature)
                reordered = self._try_all(graph_module, graph_signature)
                if min(reordered.values()) >= written:
                    _restore_order(graph_module, nodes)
                tried |= {name + _REORDERED: size for name, size in reordered.items()}
            self.plans.append(ArenaPlan(min(tried, key=lambda name: tried[name]), tried))
            return super().run(graph_module, graph_signature)

        def _set_alloc_node_spec(self, graph_module: fx.GraphModule) -> None:
            """Done above: the reordering needs the specs."""

        def _try_all(self, graph_module: fx.GraphModule, signature: ExportGraphSignature | None) -> dict[str, int]:
            return _arena_sizes(algorithms, graph_module, signature, self.alignment, io_in_plan)

    return Smallest()


def _algorithms() -> list[Algorithm]:
    """The algorithms, each with a different `__name__`, by which executorch tells them apart."""
    from executorch.exir.memory_planning import greedy

    def greedy_apart(
        alignment: int, specs: Any, graph_module: fx.GraphModule, signature: Any, extra_padding: int = 0
    ) -> Any:
        return greedy(alignment, specs, graph_module, signature, extra_padding, allow_overlapping_allocations=False)

    return [greedy, greedy_apart, largest_first]


def _arena_sizes(
    algorithms: Sequence[Algorithm],
    graph_module: fx.GraphModule,
    signature: ExportGraphSignature | None,
    alignment: int,
    io_in_plan: bool,
) -> dict[str, int]:
    """Arena bytes of each algorithm with the operators in their present order; the specs stay unchanged."""
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
            ignore_graph_input=not io_in_plan,
            ignore_graph_output=not io_in_plan,
        )
    )
    padding = 64 if _contains_xnnpack_delegate(graph_module) else 0  # as executorch's own planning adds
    args = (alignment, specs, graph_module, signature, padding)
    sizes = {algorithm.__name__: sum(algorithm(*args).bufsizes) for algorithm in algorithms}
    for spec in touched:
        spec.lifetime = [None, None]
    return sizes


def _may_reorder(graph_module: fx.GraphModule, signature: ExportGraphSignature) -> bool:
    """Whether operators may be reordered: none mutates a tensor or branches, and all sizes are fixed."""
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


def _restore_order(graph_module: fx.GraphModule, nodes: Sequence[fx.Node]) -> None:
    output = graph_module.graph.output_node()
    for node in nodes:
        if node.op not in ("placeholder", "output"):
            output.prepend(node)
    graph_module.recompile()
