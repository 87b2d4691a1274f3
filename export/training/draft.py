"""Rewrite a captured program: add and replace operators, turn tensors into constants or state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

_TENSORS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class Draft:
    """The graph of an `ExportedProgram` with its inputs and tensors, until `finish` makes a program of it again.

    `state` names the tensors that change on the device; all others are constant. Arguments and results of the methods
    are graph nodes; their values are fake tensors in `node.meta["val"]`.
    """

    def __init__(self, program: ExportedProgram, state: set[str]) -> None:
        self.program = program
        self.graph: fx.Graph = program.graph
        self.state = set(state)
        self.tensors: dict[str, Tensor] = {**program.constants, **program.state_dict}
        self.extra_inputs: list[Tensor] = []
        self._specs: dict[str, InputSpec] = {s.arg.name: s for s in program.graph_signature.input_specs}
        self._placed: dict[Any, fx.Node] = {}
        values = [n.meta.get("val") for n in self.graph.nodes]
        self.fake = next(v.fake_mode for v in values if isinstance(v, Tensor))  # type: ignore[attr-defined]
        for node in self.graph.nodes:
            if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor):
                node.meta["val"] = node.meta["val"].detach()

    def nodes(self) -> list[fx.Node]:
        """The operators in their present order."""
        return [node for node in self.graph.nodes if node.op == "call_function"]

    def find(self, name: str) -> fx.Node:
        """The node with this name."""
        node: fx.Node = next(node for node in self.graph.nodes if node.name == name)
        return node

    def placeholder_of(self, target: str) -> fx.Node:
        """The placeholder of the tensor called `target`."""
        return self.find(next(n for n, s in self._specs.items() if s.target == target))

    def target(self, node: fx.Node) -> str | None:
        """The name of the tensor that a placeholder holds; `None` for an input or an operator."""
        spec = self._specs.get(node.name) if node.op == "placeholder" else None
        return str(spec.target) if spec is not None and spec.kind in _TENSORS else None

    def frozen(self, node: fx.Node) -> Tensor | None:
        """The value of a placeholder that never changes."""
        target = self.target(node)
        return None if target is None or target in self.state else self.tensors[target]

    @contextmanager
    def inserting_before(self, node: fx.Node) -> Iterator[None]:
        """Inside, operators are added before `node`, with its module and stack trace."""
        self._like = node
        with self.graph.inserting_before(node), self.fake:
            yield

    def call(self, operator: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add one operator."""
        node = self.graph.call_function(operator, args, kwargs)
        node.meta = {k: v for k, v in self._like.meta.items() if k in ("nn_module_stack", "stack_trace", "custom")}
        node.meta["val"] = operator(*fx.map_arg(args, _value), **fx.map_arg(kwargs, _value))
        return node

    def inline(self, function: Callable[..., Tensor], *nodes: fx.Node) -> fx.Node:
        """Add the operators of a function of tensors; returns the node of its result."""
        from torch.fx.experimental.proxy_tensor import make_fx

        traced = make_fx(function)(*map(_value, nodes))
        sources = iter(nodes)
        mapped: dict[fx.Node, Any] = {}
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                mapped[node] = next(sources)
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), mapped.__getitem__)
                mapped[node] = self.call(node.target, *args, **kwargs)
            elif node.op == "output":
                result: fx.Node = mapped[node.args[0]]
        return result

    def constant(self, key: Any, make: Callable[[], Tensor]) -> fx.Node:
        """A constant, created once for each `key`."""
        if key not in self._placed:
            with unset_fake_temporarily():
                value = make()
            self._placed[key] = self._hold(f"edgetune_constant_{len(self._placed)}", InputKind.CONSTANT_TENSOR, value)
        return self._placed[key]

    def ones(self, *shape: int, value: float = 1.0) -> fx.Node:
        """A constant of this shape filled with `value`."""
        return self.constant((shape, value), lambda: torch.full(shape, value))

    def buffer(self, target: str, value: Tensor) -> fx.Node:
        """Add a tensor to the state."""
        self.state.add(target)
        return self._hold(target, InputKind.BUFFER, value)

    def _hold(self, target: str, kind: InputKind, value: Tensor) -> fx.Node:
        users = [n for n, s in self._specs.items() if s.kind is InputKind.USER_INPUT]
        name = ("b_" if kind is InputKind.BUFFER else "c_") + target.replace(".", "_")
        with self.graph.inserting_before(self.find(users[0])):
            node = self.graph.placeholder(name)
        with self.fake:
            node.meta["val"] = torch.empty_like(value, device="cpu")
        self.tensors[target] = value
        persistent = True if kind is InputKind.BUFFER else None
        self._specs[node.name] = InputSpec(kind, TensorArgument(node.name), target, persistent)
        return node

    def input(self, name: str, example: Tensor) -> fx.Node:
        """Add an input after all others."""
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        with self.fake:
            node.meta["val"] = torch.empty_like(example, device="cpu")
        self._specs[node.name] = InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None)
        self.extra_inputs.append(example)
        return node

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        """Replace `node` by another node and erase it."""
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def set_outputs(self, nodes: list[fx.Node]) -> None:
        """Set the graph's outputs until `finish`."""
        self.graph.output_node().args = (tuple(nodes),)

    def finish(self, updates: dict[str, fx.Node], outputs: list[fx.Node]) -> ExportedProgram:
        """The program that returns `outputs` and writes `updates` into its state at the end.

        State without an update is declared to be updated with itself, so that no delegate treats it as a constant.
        """
        for target in sorted(self.state - set(updates)):
            updates = {**updates, target: self.placeholder_of(target)}
        node = self.graph.output_node()
        returned_nodes = (*updates.values(), *outputs)
        node.args = (returned_nodes,)
        node.meta["val"] = tuple(n.meta["val"] for n in returned_nodes)
        self.graph.eliminate_dead_code()
        self._name_modules()
        order = [n.name for n in self.graph.nodes if n.op == "placeholder"]
        specs = [
            InputSpec(InputKind.BUFFER, spec.arg, spec.target, persistent=True) if spec.target in self.state else spec
            for spec in (self._specs[name] for name in order)
        ]
        returned = [OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(n.name), t) for t, n in updates.items()]
        returned += [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(n.name), None) for n in outputs]
        self.graph.lint()
        self.program.graph_module.recompile()
        return self._program(ExportGraphSignature(specs, returned), len(outputs))

    def _name_modules(self) -> None:
        """Record the module of each operator that reads one of its tensors: autograd loses it."""
        owners: dict[fx.Node, str] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                target = self.target(node) or ""
                owners[node] = target.rpartition(".")[0]
            elif node.op == "call_function" and not node.meta.get("nn_module_stack"):
                sources = node.all_input_nodes
                module = next((owners[s] for s in reversed(sources) if owners.get(s)), "")
                if len(sources) == 1 or all(s.op == "placeholder" for s in sources[1:]):
                    owners[node] = module if all(owners.get(s) for s in sources) else ""
                if module:
                    node.meta["nn_module_stack"] = {"owner": (module, "")}

    def _program(self, signature: ExportGraphSignature, outputs: int) -> ExportedProgram:
        users = [s for s in signature.input_specs if s.kind is InputKind.USER_INPUT]
        held = {str(s.target): s.kind for s in signature.input_specs if s.kind in _TENSORS}
        shape = ModuleCallSignature(
            inputs=[],
            outputs=[],
            in_spec=pytree.tree_structure((tuple(users), {})),
            out_spec=pytree.tree_structure(tuple(range(outputs))),
        )
        tensors = {t: self.tensors[t].detach().clone() if t in self.state else self.tensors[t] for t in held}
        given, _ = self.program.example_inputs  # type: ignore[misc]
        in_state = set(self.program.state_dict) | self.state
        stated = {t for t, kind in held.items() if kind is not InputKind.CONSTANT_TENSOR and t in in_state}
        return ExportedProgram(
            root=self.program.graph_module,
            graph=self.graph,
            graph_signature=signature,
            state_dict={t: v for t, v in tensors.items() if t in stated},
            range_constraints=self.program.range_constraints,
            module_call_graph=[ModuleCallEntry("", shape)],
            example_inputs=((*given, *self.extra_inputs), {}),
            constants={t: v for t, v in tensors.items() if t not in stated},
        )


def shape_of(node: Any) -> list[int]:
    """The shape of a node's tensor."""
    return list(node.meta["val"].shape)


def reach(start: Iterable[fx.Node], successors: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """The nodes that can be reached from `start`, itself included."""
    reached: set[fx.Node] = set()
    todo = list(start)
    while todo:
        node = todo.pop()
        if node not in reached:
            reached.add(node)
            todo += successors(node)
    return reached


def _value(node: fx.Node) -> Any:
    return node.meta["val"]
