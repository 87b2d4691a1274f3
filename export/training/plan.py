"""The plan of the arena: state is written where it lies, and operators run in the order that needs the least memory."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch.export.graph_signature import ExportGraphSignature

from edgetune.export.training.order import Unit, placed, smallest

_COPY = "aten.copy_.default"


def is_delegate(node: fx.Node) -> bool:
    """Whether the node calls into a backend."""
    return node.op == "call_function" and "executorch_call_delegate" in str(node.target)


def specs_of(node: fx.Node) -> list[Any]:
    """The tensors that a node gives, as executorch's specs."""
    spec = node.meta.get("spec")
    return [s for s in (spec if isinstance(spec, (list, tuple)) else [spec]) if s is not None]


def _outs(node: fx.Node) -> list[fx.Node]:
    """What an operator writes: the arguments called `out`, and what they are for several outputs."""
    from executorch.exir.memory_planning import _is_out_var_node
    from executorch.exir.operator.convert import get_out_args_from_opoverload

    if not _is_out_var_node(node):
        return []
    return [node.kwargs[name] for name in get_out_args_from_opoverload(node.target) if node.kwargs[name] is not None]  # type: ignore[misc]


def write_in_place(graph_module: fx.GraphModule, signature: ExportGraphSignature) -> int:
    """Let what is copied into state at the end be computed there. Returns how many copies are left.

    Done where every other reader of the state runs before, inside its delegate too: an update is elementwise, so
    that it may write over what it reads.
    """
    graph = graph_module.graph
    left = 0
    for node in [n for n in graph.nodes if str(n.target) == _COPY]:
        holder, value = node.args
        if holder.op == "placeholder" and _moves(graph_module, node, holder, value):
            node.replace_all_uses_with(holder)
            graph.erase_node(node)
        else:
            left += 1
    output = graph.output_node()
    output.meta["spec"] = fx.map_arg(output.args[0], lambda n: n.meta["spec"])  # or the old ones would be planned
    graph_module.recompile()
    return left


def _moves(graph_module: fx.GraphModule, copy: fx.Node, holder: fx.Node, value: fx.Node) -> bool:
    maker = value.args[0] if value.target is operator.getitem else value
    if not isinstance(maker, fx.Node) or maker.op != "call_function":
        return False
    readers = [user for user in holder.users if user is not copy and user is not maker and user.op != "output"]
    after = _descendants(maker)
    if any(reader in after or _alias(reader) for reader in readers):
        return False
    if is_delegate(maker):
        place: Any = value.args[1]
        if not _safe_inside(graph_module, maker, holder, place):  # type: ignore[arg-type]
            return False
        spec = holder.meta["spec"]
        value.meta["spec"] = spec
        specs = list(maker.meta["spec"])
        specs[place] = spec
        maker.meta["spec"] = type(maker.meta["spec"])(specs)
    elif _elementwise(maker) and [value.kwargs.get("out")] == _outs(maker):
        old: Any = maker.kwargs["out"]
        maker.update_kwarg("out", holder)
        maker.meta["spec"] = holder.meta["spec"]
        if not old.users:
            graph_module.graph.erase_node(old)
    else:
        return False
    for reader in readers:  # they must stay before
        maker.meta.setdefault("edgetune_after", []).append(reader)
    return True


def _alias(node: fx.Node) -> bool:
    return "memory.view" in str(node.target) or getattr(node.target, "__name__", "") == "view"


def _elementwise(node: fx.Node) -> bool:
    return str(node.target).startswith(("aten.add.", "aten.sub.", "aten.mul."))


def _safe_inside(graph_module: fx.GraphModule, delegate: fx.Node, holder: fx.Node, place: int) -> bool:
    """Whether the delegate's output at `place` is elementwise and everything else there has read the state before."""
    lowered = getattr(graph_module, str(delegate.args[0].target)).original_module  # type: ignore[union-attr]
    inner, inputs = lowered.graph, set(lowered.graph_signature.user_inputs)
    placeholders = [n for n in inner.nodes if n.op == "placeholder" and n.name in inputs]  # not its own constants
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


def _descendants(node: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    todo = list(node.users)
    while todo:
        user = todo.pop()
        if user not in seen:
            seen.add(user)
            todo.extend(user.users)
            for kwarg in user.kwargs.values():
                if isinstance(kwarg, fx.Node):
                    todo.extend(u for u in kwarg.users)
    return seen


def in_order(graph_module: fx.GraphModule, signature: ExportGraphSignature) -> None:
    """Put the operators of a lowered graph into the order that needs the smallest arena."""
    graph = graph_module.graph
    units, nodes = _units(graph)
    sizes, kept = _sizes(graph, signature)
    for unit in smallest(units, sizes, kept):
        for node in nodes[unit]:
            graph.output_node().prepend(node)
    graph.lint()
    graph_module.recompile()


def base_of(spec: Any) -> Any:
    """The tensor whose memory a view is of."""
    while type(spec).__name__ == "_ViewSpec":
        spec = object.__getattribute__(spec, "_base")
    return spec


def _sizes(graph: fx.Graph, signature: ExportGraphSignature) -> tuple[dict[Any, int], set[Any]]:
    """Bytes of every tensor that the plan holds, and those that live to the end."""
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
            outs = [o for o in _outs(node) if o.op == "call_function"]
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
    """One of executorch's planning algorithms: `order.placed`; their greedy one for nested and in-place tensors."""
    from executorch.exir.memory_planning import MemoryAlgoResult, SpecAllocResult, greedy

    nested = any(getattr(graph_module, "input_mem_buffer_sizes", None) or ())
    if nested or not specs or any(s.inplace_base is not None or s.mem_id is not None for s in specs):
        return greedy(alignment, specs, graph_module, signature, extra_padding)  # which knows of these
    bases = {base_of(spec): spec for spec in specs}
    for spec in bases.values():
        spec.realign(alignment)
    total, offsets = placed({b: (s.allocated_memory, *s.lifetime) for b, s in bases.items()}, alignment)
    rows = {spec: SpecAllocResult(1, 0, offsets[base_of(spec)]) for spec in specs}
    return MemoryAlgoResult(rows, [0, total + extra_padding])


def planning() -> Any:
    """executorch's planning pass, with state shared by all methods, and with the order and the plan of this file."""
    from executorch.exir.memory_planning import MemoryPlanningAlgorithmSuite, greedy
    from executorch.exir.passes import MemoryPlanningPass

    class Planning(MemoryPlanningPass):  # type: ignore[misc]
        def run(self, graph_module: fx.GraphModule, graph_signature: ExportGraphSignature | None = None) -> Any:
            assert graph_signature is not None
            super()._set_alloc_node_spec(graph_module)
            write_in_place(graph_module, graph_signature)
            in_order(graph_module, graph_signature)
            return super().run(graph_module, graph_signature)

        def _set_alloc_node_spec(self, graph_module: fx.GraphModule) -> None:
            """Done above: the order needs them."""

    return Planning(MemoryPlanningAlgorithmSuite([greedy, largest_first]), share_mutable_buffers=True)
