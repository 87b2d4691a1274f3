"""A captured program opened for rewriting: operators are added and replaced, tensors become constants or state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    """The graph of an `ExportedProgram` with its inputs and tensors, until `finished` makes a program of it again.

    `state` names the tensors that change on the device; everything else is constant. Node arguments are graph nodes
    throughout; their values are fake tensors in `node.meta["val"]`.
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
        """The operators, in order, as of now."""
        return [node for node in self.graph.nodes if node.op == "call_function"]

    def named(self, name: str) -> fx.Node:
        """The node of this name."""
        found: fx.Node = next(node for node in self.graph.nodes if node.name == name)
        return found

    def holder(self, target: str) -> fx.Node:
        """The placeholder of the tensor called `target`."""
        return self.named(next(n for n, s in self._specs.items() if s.target == target))

    def target(self, node: fx.Node) -> str | None:
        """The name of the tensor that a placeholder holds; `None` for an input or an operator."""
        spec = self._specs.get(node.name) if node.op == "placeholder" else None
        return str(spec.target) if spec is not None and spec.kind in _TENSORS else None

    def frozen(self, node: fx.Node) -> Tensor | None:
        """The value of a placeholder that never changes."""
        target = self.target(node)
        return None if target is None or target in self.state else self.tensors[target]

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """Operators added inside stand before `node` and carry its place in the model."""
        self._like = node
        with self.graph.inserting_before(node), self.fake:
            yield

    def call(self, operator: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add one operator where `before` says."""
        node = self.graph.call_function(operator, args, kwargs)
        node.meta = {k: v for k, v in self._like.meta.items() if k in ("nn_module_stack", "stack_trace", "custom")}
        node.meta["val"] = operator(*fx.map_arg(args, _value), **fx.map_arg(kwargs, _value))
        return node

    def inline(self, function: Callable[..., Tensor], *nodes: fx.Node) -> fx.Node:
        """Add the operators of a function of tensors where `before` says; returns the node of what it gives."""
        from torch.fx.experimental.proxy_tensor import make_fx

        traced = make_fx(function)(*map(_value, nodes))
        given = iter(nodes)
        known: dict[fx.Node, Any] = {}
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(given)
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = self.call(node.target, *args, **kwargs)
            elif node.op == "output":
                result: fx.Node = known[node.args[0]]
        return result

    def constant(self, key: Any, make: Callable[[], Tensor]) -> fx.Node:
        """A constant, made once for each `key`."""
        if key not in self._placed:
            with unset_fake_temporarily():
                value = make()
            self._placed[key] = self._hold(f"edgetune_constant_{len(self._placed)}", InputKind.CONSTANT_TENSOR, value)
        return self._placed[key]

    def ones(self, *shape: int, value: float = 1.0) -> fx.Node:
        """A constant of that shape with the same number everywhere."""
        return self.constant((shape, value), lambda: torch.full(shape, value))

    def buffer(self, target: str, value: Tensor) -> fx.Node:
        """A new tensor of state."""
        self.state.add(target)
        return self._hold(target, InputKind.BUFFER, value)

    def _hold(self, target: str, kind: InputKind, value: Tensor) -> fx.Node:
        users = [n for n, s in self._specs.items() if s.kind is InputKind.USER_INPUT]
        name = ("b_" if kind is InputKind.BUFFER else "c_") + target.replace(".", "_")
        with self.graph.inserting_before(self.named(users[0])):
            node = self.graph.placeholder(name)
        with self.fake:
            node.meta["val"] = torch.empty_like(value, device="cpu")
        self.tensors[target] = value
        persistent = True if kind is InputKind.BUFFER else None
        self._specs[node.name] = InputSpec(kind, TensorArgument(node.name), target, persistent)
        return node

    def input(self, name: str, example: Tensor) -> fx.Node:
        """A new input, behind all others."""
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        with self.fake:
            node.meta["val"] = torch.empty_like(example, device="cpu")
        self._specs[node.name] = InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None)
        self.extra_inputs.append(example)
        return node

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        """Put `by` in the place of `node` everywhere."""
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def returns(self, nodes: list[fx.Node]) -> None:
        """Make these the graph's outputs, for as long as it is rewritten."""
        self.graph.output_node().args = (tuple(nodes),)

    def finished(self, updates: dict[str, fx.Node], outputs: list[fx.Node]) -> ExportedProgram:
        """The program that returns `outputs` and writes `updates` into its state at the end.

        State without an update is declared as changed by itself: so no delegate takes it for a constant.
        """
        for target in sorted(self.state - set(updates)):
            updates = {**updates, target: self.holder(target)}
        node = self.graph.output_node()
        returned_nodes = (*updates.values(), *outputs)
        node.args = (returned_nodes,)
        node.meta["val"] = tuple(n.meta["val"] for n in returned_nodes)
        self.graph.eliminate_dead_code()
        self._name_modules()
        order = [n.name for n in self.graph.nodes if n.op == "placeholder"]
        specs = [self._spec(self._specs[name]) for name in order]
        returned = [OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(n.name), t) for t, n in updates.items()]
        returned += [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(n.name), None) for n in outputs]
        self.graph.lint()
        self.program.graph_module.recompile()
        return self._program(ExportGraphSignature(specs, returned), len(outputs))

    def _name_modules(self) -> None:
        """Say of each operator that reads a tensor of the model which module that is of: autograd forgets it."""
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

    def _spec(self, spec: InputSpec) -> InputSpec:
        if spec.target in self.state:
            return InputSpec(InputKind.BUFFER, spec.arg, spec.target, persistent=True)
        return spec

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
        stated = {t for t, kind in held.items() if kind is not InputKind.CONSTANT_TENSOR and t in self._stated()}
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

    def _stated(self) -> set[str]:
        return set(self.program.state_dict) | self.state


def _value(node: fx.Node) -> Any:
    return node.meta["val"]
