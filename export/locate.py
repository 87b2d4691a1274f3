"""Locate the module in which a program begins to differ from its model, by running modules as separate programs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edgetune.capture import operators
from edgetune.capture.fast_path import slow_path
from edgetune.core.errors import EdgetuneError
from edgetune.core.quiet import silence_libraries
from edgetune.export.lower import lower
from edgetune.export.targets.target import Target
from edgetune.runtime.run import run_programs
from edgetune.runtime.verify import Row

_SECONDS = 180.0  # the search ends after this time with the innermost module so far
_BATCH = 12  # programs in one child


@dataclass
class _Call:
    """One call of a module: its inputs, its outputs, and the calls inside it in order."""

    name: str
    module: nn.Module
    given: Any  # (args, kwargs), their tensors copied
    tensors: list[Tensor] = field(default_factory=list)  # the outputs
    inner: list[_Call] = field(default_factory=list)


class _Isolated(nn.Module):
    """A module with the arguments of one call: takes their tensors, returns every tensor of its output."""

    def __init__(self, call: _Call) -> None:
        super().__init__()
        self.model = call.module
        leaves, self.spec = pytree.tree_flatten(call.given)
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.inputs = tuple({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())
        order = [id(tensor) for tensor in self.inputs]
        self.places = {i: order.index(id(leaf)) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        self.eval()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensors[self.places[i]] if i in self.places else leaf for i, leaf in enumerate(self.leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return tuple(_tensors(self.model(*args, **kwargs)))


def locate_difference(
    program: nn.Module, row: Row, target: Target, allowed: float, dtype: torch.dtype = torch.float32
) -> str:
    """The module in which a program begins to differ from its model, in a sentence; empty if it cannot be located.

    Each module runs as a separate program, in the order of the calls, on its inputs in eager mode. The search
    descends into the first one that differs by more than `allowed`, for three minutes at most.
    """
    until = time.monotonic() + _SECONDS
    try:
        with silence_libraries(), torch.no_grad():
            root = _record_calls(program, row)
            call, difference, innermost = root, 0.0, False
            while not innermost and time.monotonic() < until:
                inside = _first_different(call.inner, target, allowed, until, dtype)
                innermost = inside is None and time.monotonic() < until
                call, difference = inside or (call, difference)
    except Exception:  # the error that is being explained matters more
        return ""
    if call is root:
        between = "no single module differs as much: the difference comes from code between the modules, or accumulates"
        return between if root.inner and innermost else ""
    inner = "; no module inside it does" if call.inner and innermost else ""
    return (
        f"it begins in module {call.name} ({type(call.module).__name__}): exported separately, with the inputs that it "
        f"gets, it differs by {difference:.2g} of its largest value{inner}"
    )


def _first_different(
    calls: Sequence[_Call], target: Target, allowed: float, until: float, dtype: torch.dtype
) -> tuple[_Call, float] | None:
    """The first call whose program differs by more than allowed, and by how much of its largest value."""
    with tempfile.TemporaryDirectory(prefix="edgetune-") as folder:
        waiting = list(calls)
        while waiting and time.monotonic() < until:
            lowered: list[tuple[_Call, Path, Row]] = []
            while waiting and len(lowered) < _BATCH and time.monotonic() < until:
                call = waiting.pop(0)
                isolated = _Isolated(call)
                inputs = isolated.inputs
                if not inputs or not call.tensors:
                    continue
                path = Path(folder) / f"{len(lowered)}.pte"
                try:
                    path.write_bytes(lower(isolated, inputs, target, dtype=dtype).data)
                except EdgetuneError:  # cannot be compared as a whole; perhaps its parts can
                    waiting[:0] = call.inner
                    continue
                lowered.append((call, path, inputs))
            results = run_programs([(path, inputs) for _, path, inputs in lowered])
            for (call, _, _), outputs in zip(lowered, results, strict=True):
                difference = _difference(call.tensors, outputs)
                if not difference <= allowed:
                    return call, difference
    return None


def _difference(expected: Sequence[Tensor], got: Sequence[Tensor] | None) -> float:
    """The worst output's largest difference, relative to its largest value; infinite if shapes differ."""
    if got is None or [t.shape for t in expected] != [t.shape for t in got]:
        return float("inf")
    largest = 0.0
    for one, other in zip(expected, got, strict=True):
        if one.numel():
            wide = one.double()
            difference = float((wide - other.double()).abs().max()) / (float(wide.abs().max()) or 1.0)
            largest = max(largest, difference) if difference == difference else float("inf")
    return largest


def _record_calls(program: nn.Module, row: Row) -> _Call:
    """Run the model on the row and return the tree of module calls."""
    root = _Call("", program, ())
    stack = [root]
    with slow_path(program), _recording_hooks(program, stack):  # the fast path does not call submodules
        program(*row)
    return root


@contextmanager
def _recording_hooks(program: nn.Module, stack: list[_Call]) -> Iterator[None]:
    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            copies: dict[int, Tensor] = {}  # keeps identity: attention checks whether query and key are the same tensor
            given = pytree.tree_map_only(Tensor, lambda t: copies.setdefault(id(t), t.clone()), (args, kwargs))
            call = _Call(name, module, given)
            stack[-1].inner.append(call)
            stack.append(call)

        return hook

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        stack.pop().tensors = [tensor.clone() for tensor in _tensors(output)]

    handles = []
    for name, module in program.named_modules():
        short = operators.shorten(name)
        if module is not program and short not in ("", "model"):
            handles.append(module.register_forward_pre_hook(enter(short), with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
