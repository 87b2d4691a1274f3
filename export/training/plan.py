"""Plan the arena: update state in place, and run operators in the order that needs the least memory."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch.export.graph_signature import ExportGraphSignature

from edgetune.export.training.draft import reach
from edgetune.export.training.order import Unit, place_tensors, schedule_units

_COPY = "aten.copy_.default"


def is_delegate(node: fx.Node) -> bool:
    """Whether the node calls into a backend."""
    return node.op == "call_function" and "executorch_call_delegate" in str(node.target)


def specs_of(node: fx.Node) -> list[Any]:
    """executorch's specs of the tensors that a node returns."""
    spec = node.meta.get("spec")
    return [s for s in (spec if isinstance(spec, (list, tuple)) else [spec]) if s is not None]


def _outputs_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that an operator writes: its `out` arguments."""
    from executorch.exir.memory_planning import _is_out_var_node
    from executorch.exir.operator.convert import get_out_args_from_opoverload

    if not _is_out_var_node(node):
        return []
    return [node.kwargs[name] for name in get_out_args_from_opoverload(node.target) if node.kwargs[name] is not None]  # type: ignore[misc]


def update_in_place(graph_module: fx.GraphModule, signature: ExportGraphSignature) -> int:
    """Compute updates in the memory of the state instead of copying them there at the end. Returns the copies left.

    Requires that every other reader of the state runs before, also within a delegate. An update is elementwise, so
    it may overwrite what it reads.
    """
    graph = graph_module.graph
    left = 0
    for node in [n for n in graph.nodes if str(n.target) == _COPY]:
        holder, value = node.args
        if holder.op == "placeholder" and _write_in_place(graph_module, node, holder, value):
            node.replace_all_uses_with(holder)
            graph.erase_node(node)
        else:
            left += 1
    output = graph.output_node()
    output.meta["spec"] = fx.map_arg(
        output.args[0], lambda n: n.meta["spec"]
    )  # otherwise the old ones would be planned
    graph_module.recompile()
    return left


def _write_in_place(graph_module: fx.GraphModule, copy: fx.Node, holder: fx.Node, value: fx.Node) -> bool:
    maker = value.args[0] if value.target is operator.getitem else value
    if not isinstance(maker, fx.Node) or maker.op != "call_function":
        return False
    readers = [user for user in holder.users if user is not copy and user is not maker and user.op != "output"]
    after = reach(maker.users, _readers_of)
    if any(reader in after or _is_view(reader) for reader in readers):
        return False
    if is_delegate(maker):
        place: Any = value.args[1]
        if not _is_safe_inside(graph_module, maker, holder, place):  # type: ignore[arg-type]
            return False
        spec = holder.meta["spec"]
        value.meta["spec"] = spec
        specs = list(maker.meta["spec"])
        specs[place] = spec
        maker.meta["spec"] = type(maker.meta["spec"])(specs)
    elif _is_elementwise(maker) and [value.kwargs.get("out")] == _outputs_of(maker):
        old: Any = maker.kwargs["out"]
        maker.update_kwarg("out", holder)
        maker.meta["spec"] = holder.meta["spec"]
        if not old.users:
            graph_module.graph.erase_node(old)
    else:
        return False
    for reader in readers:  # they must run before
        maker.meta.setdefault("edgetune_after", []).append(reader)
    return True


def _is_view(node: fx.Node) -> bool:
    return "memory.view" in str(node.target) or getattr(node.target, "__name__", "") == "view"


def _is_elementwise(node: fx.Node) -> bool:
    return str(node.target).startswith(("aten.add.", "aten.sub.", "aten.mul."))


def _is_safe_inside(graph_module: fx.GraphModule, delegate: fx.Node, holder: fx.Node, place: int) -> bool:
    """Whether the delegate's output `place` is elementwise and all its other readers of the state run before it."""
    lowered = getattr(graph_module, str(delegate.args[0].target)).original_module  # type: ignore[union-attr]
    inner, inputs = lowered.graph, set(lowered.graph_signature.user_inputs)
    placeholders = [n for n in inner.nodes if n.op == "placeholder" and n.name in inputs]  # not its constants
    given = list(delegate.args[1:])
    if len(placeholders) != len(given):
        return False
    output = inner.output_node().args[0][place]
    if not any(word in str(output.target) for word in ("add.Tensor", "sub.Tensor", "mul.Tensor")):
        return False
    order = {n: i for i, n in enumerate(inner.nodes)}
    for node, argument in zip(placeholders, given, strict=True):
        if argument is holder and any(order[user] > order[output] for user in node.users):
            return False
    return True


def _readers_of(node: fx.Node) -> list[fx.Node]:
    """The readers of a node, and of the tensors that it writes as keyword arguments."""
    written = [argument for argument in node.kwargs.values() if isinstance(argument, fx.Node)]
    return [*node.users, *(user for argument in written for user in argument.users)]


def reorder(graph_module: fx.GraphModule, signature: ExportGraphSignature) -> None:
    """Put the operators of a lowered graph into the order with the smallest arena."""
    graph = graph_module.graph
    units, nodes = _units(graph)
    sizes, kept = _sizes(graph, signature)
    for unit in schedule_units(units, sizes, kept):
        for node in nodes[unit]:
            graph.output_node().prepend(node)
    graph.lint()
    graph_module.recompile()


def base_of(spec: Any) -> Any:
    """The tensor whose memory a view uses."""
    while type(spec).__name__ == "_ViewSpec":
        spec = object.__getattribute__(spec, "_base")
    return spec


def _sizes(graph: fx.Graph, signature: ExportGraphSignature) -> tuple[dict[Any, int], set[Any]]:
    """Bytes of every tensor in the plan, and the tensors that live to the end."""
    held = {*signature.inputs_to_parameters, *signature.inputs_to_buffers, *signature.inputs_to_lifted_tensor_constants}
    constant = {base_of(s) for n in graph.nodes if n.op == "placeholder" and n.name in held for s in specs_of(n)}
    every = {base_of(s) for n in graph.nodes for s in specs_of(n)}
    kept = {base_of(s) for n in graph.output_node().all_input_nodes for s in specs_of(n)}
    return {s: 0 if s in constant else s.nbytes() for s in every}, kept


def _units(graph: fx.Graph) -> tuple[list[Unit], dict[Unit, list[fx.Node]]]:
    units: list[Unit] = []
    nodes: dict[Unit, list[fx.Node]] = {}
    owner: dict[fx.Node, Unit] = {}
    for node in graph.nodes:
        if node.op not in ("call_function", "get_attr") or getattr(node.target, "__name__", "") == "alloc":
            continue
        if node.target is operator.getitem:
            unit = owner[node.args[0]]
            nodes[unit].append(node)
        else:
            unit = Unit(len(units))
            outs = [o for o in _outputs_of(node) if o.op == "call_function"]
            nodes[unit] = [*outs, node]
            owner |= dict.fromkeys(outs, unit)
            units.append(unit)
        owner[node] = unit
        unit.writes |= dict.fromkeys(base_of(s) for o in nodes[unit] for s in specs_of(o))
        for source in node.all_input_nodes:
            if owner.get(source) is not unit:
                unit.reads |= dict.fromkeys(base_of(s) for s in specs_of(source))
                if source in owner:
                    unit.before[owner[source]] = None
    for node, unit in owner.items():
        earlier = list(node.meta.get("edgetune_after", ()))
        if str(node.target) == _COPY:
            holder: Any = node.args[0]
            earlier += [user for user in holder.users if user is not node and user.op != "output"]
        unit.before |= dict.fromkeys(owner[other] for other in earlier if owner[other] is not unit)
    return units, nodes


def largest_first(
    alignment: int, specs: Any, graph_module: fx.GraphModule, signature: Any, extra_padding: int = 0
) -> Any:
    """A planning algorithm for executorch: `place_tensors`; its own greedy one for nested and in-place tensors."""
    from executorch.exir.memory_planning import MemoryAlgoResult, SpecAllocResult, greedy

    nested = any(getattr(graph_module, "input_mem_buffer_sizes", None) or ())
    if nested or not specs or any(s.inplace_base is not None or s.mem_id is not None for s in specs):
        return greedy(alignment, specs, graph_module, signature, extra_padding)  # which supports these
    bases = {base_of(spec): spec for spec in specs}
    for spec in bases.values():
        spec.realign(alignment)
    total, offsets = place_tensors({b: (s.allocated_memory, *s.lifetime) for b, s in bases.items()}, alignment)
    rows = {spec: SpecAllocResult(1, 0, offsets[base_of(spec)]) for spec in specs}
    return MemoryAlgoResult(rows, [0, total + extra_padding])


def training_planning_pass() -> Any:
    """executorch's planning pass, with state shared by all methods, and with the order and plan of this module."""
    from executorch.exir.memory_planning import MemoryPlanningAlgorithmSuite, greedy
    from executorch.exir.passes import MemoryPlanningPass

    class Planning(MemoryPlanningPass):  # type: ignore[misc]
        def run(self, graph_module: fx.GraphModule, graph_signature: ExportGraphSignature | None = None) -> Any:
            assert graph_signature is not None
            super()._set_alloc_node_spec(graph_module)
            update_in_place(graph_module, graph_signature)
            reorder(graph_module, graph_signature)
            return super().run(graph_module, graph_signature)

        def _set_alloc_node_spec(self, graph_module: fx.GraphModule) -> None:
            """Done above: the reordering needs the specs."""

    return Planning(MemoryPlanningAlgorithmSuite([greedy, largest_first]), share_mutable_buffers=True)
