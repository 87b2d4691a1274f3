"""Several methods in one program over shared weights: an encoder and a decoder, features and logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.capture import dynamic as sizes_of
from edgetune.capture.dynamic import Axis, Dynamic
from edgetune.capture.positional import as_plain
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs, call, tensors_of
from edgetune.core.ledger import Parity
from edgetune.core.modes import same_buffers
from edgetune.core.outputs import named_outputs
from edgetune.core.quiet import quiet
from edgetune.export.lower import Layout, Lowered, check_plain, lower_methods
from edgetune.export.pipeline import call_of, chosen_target, locator, manifest_of, output_names
from edgetune.export.rows import free_specs, names_of, specs_of
from edgetune.export.targets import Target
from edgetune.program.artifact import Artifact, validate_inputs, write_pair
from edgetune.program.manifest import Call, Manifest, TensorSpec, data_path
from edgetune.runtime import verify
from edgetune.runtime.allowed import allowed_difference
from edgetune.runtime.verify import Row

Method = Callable[..., Any]  # a module, or a bound method of one


def export_methods(
    methods: Mapping[str, tuple[Method, Inputs]],
    path: str | Path,
    *,
    device: str | None = None,
    target: str | None = None,
    check_inputs: Mapping[str, Sequence[Inputs]] | None = None,
    dynamic: Mapping[str, Dynamic] | None = None,
    external_data: bool = False,
    io_in_plan: bool = True,
    max_relative_difference: float | None = None,
) -> Artifact:
    """Lower several modules, or methods of them, into one program at `path` (a `.pte`); equal weights are stored once.

        et.export_methods({"encode": (model.encode, (audio,)), "decode": (model.decode, (tokens, states))}, "model.pte")

    Each method takes the tensors of its example inputs by position, with their shapes, and returns all tensors that
    it returns in eager mode: one tensor, a tuple or a mapping. It runs in a child process and is compared with eager
    mode on its example inputs, or on `check_inputs`. `device`, `target`, `external_data` and `io_in_plan` are as in
    `et.export`, and so is `dynamic`, for each method.

    Raises `EdgetuneError` (exit code 5) if a method cannot be lowered or does not run, if a value is not finite, or
    if a value of an output differs by more than `max_relative_difference` of the largest value of the output;
    `None`: as in `et.export`, for the layers of the method's module. Then nothing new is left at `path`.
    """
    path, layout = Path(path), Layout(weights_apart=external_data, holds_io=io_in_plan)
    chosen = chosen_target(path, device, target)
    _check_names(methods, check_inputs or {}, dynamic or {})
    with ExitStack() as stack:
        entries = []
        for name, (method, example) in methods.items():
            owner = _owner(name, method)
            check_plain(owner)
            here = stack.enter_context(as_plain(owner))
            entry = Entry(name, here, None if method is owner else method.__func__, example)  # type: ignore[attr-defined]
            free, checks = (dynamic or {}).get(name), (check_inputs or {}).get(name)
            entries.append(_Asked(entry, example, checks, free))
        lowered = lower_methods({a.entry.name: (a.entry, a.example, a.axes) for a in entries}, chosen, layout)

        first = next(iter(lowered.values()))

        def prove(partial: Path) -> Manifest:
            data = data_path(partial) if first.weights else None
            calls = []
            for asked in entries:
                parity, outputs = _prove(partial, asked, chosen, data, max_relative_difference)
                calls.append(_call(asked, lowered[asked.entry.name], parity, outputs, layout))
            return manifest_of("methods", first, tuple(calls), chosen, device, path)

        return Artifact(path=path, manifest=write_pair(path, first.data, prove, first.weights))


class Entry(nn.Module):
    """One method as a program sees it: positional tensors in, all tensors out.

    The owner's name among the parameters is that of the method: two modules may have weights of one name.
    """

    def __init__(self, name: str, owner: nn.Module, function: Any, inputs: Inputs) -> None:
        super().__init__()
        self.name = name
        self.function = function  # None: the owner is called
        self.names = tuple(inputs) if isinstance(inputs, dict) else ()
        self.child = f"model__{name}"
        self.add_module(self.child, owner)
        self.eval()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Every tensor of what the method returns."""
        return tuple(self.named_outputs(tensors).values())

    def named_outputs(self, tensors: Row) -> dict[str, Tensor]:
        """The outputs by the names that a manifest gives them."""
        owner = getattr(self, self.child)
        given: Inputs = dict(zip(self.names, tensors)) if self.names else tensors  # noqa: B905
        if self.function is None:
            return named_outputs(call(owner, given))
        return named_outputs(self.function(owner, **given) if isinstance(given, dict) else self.function(owner, *given))


class _Asked:
    """One method with its example, its rows and its axes, in the sizes that they are used in."""

    def __init__(self, entry: Entry, example: Inputs, checks: Sequence[Inputs] | None, free: Dynamic | None) -> None:
        what = f"the inputs of {entry.name}"
        names, tensors = names_of(example), tuple(t.detach().cpu().contiguous() for t in tensors_of(example))
        if not tensors:
            raise EdgetuneError(f"{what}: a method takes at least one tensor")
        self.entry = entry
        self.axes: tuple[Axis, ...] = sizes_of.axes_of(free or {}, names, tensors)
        self.inputs: tuple[TensorSpec, ...] = free_specs(tensors, names, self.axes)
        given = [validate_inputs(self.inputs, some, what) for some in checks or [example]]
        sizes = sizes_of.sizes_to_check(self.axes) if self.axes else []
        sized = [sizes_of.resize_row(given[i % len(given)], self.axes, some) for i, some in enumerate(sizes)]
        self.rows: list[Row] = [*sized, *given]
        self.example: Row = sized[0] if sized else tensors
        self.outputs = output_names(entry, self.example)


def _check_names(methods: Mapping[str, Any], *others: Mapping[str, Any]) -> None:
    if not methods:
        raise EdgetuneError("a program has at least one method", action='write {"forward": (model, inputs)}')
    strange = [name for name in methods if not name.isidentifier()]
    if strange:
        raise EdgetuneError("a method's name is an identifier", got=strange[0])
    for name in (name for other in others for name in other if name not in methods):
        raise EdgetuneError("no such method", got=name, allowed=methods)


def _owner(name: str, method: Method) -> nn.Module:
    owner = method if isinstance(method, nn.Module) else getattr(method, "__self__", None)
    if not isinstance(owner, nn.Module):
        raise EdgetuneError(
            f"method {name} is neither a module nor a method of one",
            got=type(method).__name__,
            action="give a module, or a bound method such as model.encode",
        )
    return owner


def _prove(
    partial: Path, asked: _Asked, target: Target, data: Path | None, most: float | None
) -> tuple[Parity | None, list[Row]]:
    """Parity and the outputs of each row; of the first two alone where this machine cannot run the target."""
    if not target.runs_here:
        with quiet(), same_buffers(asked.entry), torch.no_grad():
            return None, [asked.entry(*row) for row in asked.rows[:2]]
    name, locate = asked.entry.name, locator(asked.entry, target, most)
    compared = verify.run_both(partial, asked.entry, asked.rows, method=name, data=data, locate=locate)
    parity = compared.parity(len(asked.rows), allowed_difference(asked.entry) if most is None else most, "input")
    verify.check_values(parity.outputs, parity.max_relative_allowed, lambda: locate(compared.worst), program=name)
    return parity, compared.results


def _call(asked: _Asked, lowered: Lowered, parity: Parity | None, outputs: list[Row], layout: Layout) -> Call:
    specs = specs_of(outputs[0], asked.outputs, outputs[1] if asked.axes else None)
    return call_of(asked.entry.name, lowered, asked.inputs, specs, parity, holds_io=layout.holds_io)
