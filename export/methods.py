"""Export several methods over shared weights as one program: an encoder and a decoder, features and logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edgetune.capture.dynamic import Axis, Dynamic, axes_of
from edgetune.capture.positional import as_plain
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs, call, tensors_of
from edgetune.core.outputs import named_outputs
from edgetune.core.parity import Parity
from edgetune.export.lower import Layout, check_finalized, lower_methods
from edgetune.export.pipeline import call_of, choose_target, eager_rows, locator, manifest_of, output_names
from edgetune.export.program_inputs import ProgramInputs, names_of, prepare_inputs, specs_of
from edgetune.export.targets.target import Target
from edgetune.program.artifact import Artifact, write_pair
from edgetune.program.card import write_card
from edgetune.program.carried import Carried, write_tokenizer
from edgetune.program.manifest import Manifest, data_path
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
    one_row: bool = False,
    max_relative_difference: float | None = None,
    carried: Carried | None = None,
) -> Artifact:
    """Lower several modules, or methods of them, into one program at `path` (a `.pte`); equal weights are stored once.

        et.export_methods({"encode": (model.encode, (audio,)), "decode": (model.decode, (tokens, states))}, "model.pte")

    Each method takes the tensors of its example inputs by position, with their shapes, and returns all tensors that
    it returns in eager mode: one tensor, a tuple or a mapping. It runs in a child process and is compared with eager
    mode on its example inputs, or on `check_inputs`. `device`, `target`, `external_data`, `io_in_plan`, `one_row`
    and `carried` are as in `et.export`, and so is `dynamic`, for each method.

    Raises `EdgetuneError` (exit code 5) if a method cannot be lowered or does not run, if a value is not finite, or
    if a value of an output differs by more than `max_relative_difference` of the largest value of the output;
    `None`: as in `et.export`, for the layers of the method's module. Then nothing new is left at `path`.
    """
    path, layout = Path(path), Layout(external_data=external_data, io_in_plan=io_in_plan)
    chosen = choose_target(path, device, target)
    _check_names(methods, check_inputs or {}, dynamic or {})
    with ExitStack() as stack:
        requests = []
        for name, (method, example) in methods.items():
            owner = _owner(name, method)
            check_finalized(owner)
            plain = stack.enter_context(as_plain(owner))
            function = None if method is owner else method.__func__  # type: ignore[attr-defined]
            module = MethodModule(name, plain, function, example)
            free, checks = (dynamic or {}).get(name), (check_inputs or {}).get(name)
            requests.append(make_request(module, example, checks, free, one_row=one_row))
        lowered = lower_methods({r.module.name: (r.module, r.inputs.example, r.axes) for r in requests}, chosen, layout)

        first = next(iter(lowered.values()))

        def prove(partial: Path) -> Manifest:
            data = data_path(partial) if first.weights else None
            calls = []
            for request in requests:
                name = request.module.name
                parity, outputs = prove_method(partial, request, chosen, data, max_relative_difference)
                specs = specs_of(outputs[0], request.outputs, outputs[1] if request.axes else None)
                calls.append(call_of(name, lowered[name], request.inputs.specs, specs, parity, io_in_plan=io_in_plan))
            beside = None if carried is None else write_tokenizer(carried, path)
            return manifest_of("methods", first, tuple(calls), chosen, device, path, carried=beside)

        manifest = write_pair(path, first.data, prove, first.weights)
    if carried is not None:
        write_card(path, manifest)
    return Artifact(path=path, manifest=manifest)


class MethodModule(nn.Module):
    """One method as a module of positional tensors, returning all tensors of its result.

    The owner's name in the parameter names includes the method's: two modules may have weights of the same name.
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
        """All tensors that the method returns."""
        return tuple(self.named_outputs(tensors).values())

    def named_outputs(self, tensors: Row) -> dict[str, Tensor]:
        """The outputs by their names in the manifest."""
        owner = getattr(self, self.child)
        given: Inputs = dict(zip(self.names, tensors)) if self.names else tensors  # noqa: B905
        if self.function is None:
            return named_outputs(call(owner, given))
        return named_outputs(self.function(owner, **given) if isinstance(given, dict) else self.function(owner, *given))


@dataclass(frozen=True)
class MethodRequest:
    """One method to export, with its inputs, the names of its outputs and its free axes."""

    module: MethodModule
    inputs: ProgramInputs
    outputs: tuple[str, ...]
    axes: tuple[Axis, ...]


def make_request(
    module: MethodModule,
    example: Inputs,
    checks: Sequence[Inputs] | None,
    dynamic: Dynamic | None,
    *,
    one_row: bool = False,
) -> MethodRequest:
    """The method with its inputs, which are checked."""
    try:
        axes = axes_of(dynamic or {}, names_of(example), tensors_of(example))
        inputs = prepare_inputs(example, checks, axes, one_row=one_row)
    except EdgetuneError as error:
        raise error.within(f"method {module.name}") from None
    return MethodRequest(module, inputs, output_names(module, inputs.example), axes)


def _check_names(methods: Mapping[str, Any], *others: Mapping[str, Any]) -> None:
    if not methods:
        raise EdgetuneError("a program needs at least one method", action='write {"forward": (model, inputs)}')
    invalid = [name for name in methods if not name.isidentifier()]
    if invalid:
        raise EdgetuneError("a method's name must be an identifier", got=invalid[0])
    for name in (name for other in others for name in other if name not in methods):
        raise EdgetuneError("no such method", got=name, allowed=methods)


def _owner(name: str, method: Method) -> nn.Module:
    owner = method if isinstance(method, nn.Module) else getattr(method, "__self__", None)
    if not isinstance(owner, nn.Module):
        raise EdgetuneError(
            f"method {name} is neither a module nor a method of one",
            got=type(method).__name__,
            action="pass a module, or a bound method such as model.encode",
        )
    return owner


def prove_method(
    partial: Path, request: MethodRequest, target: Target, data: Path | None, allowed: float | None
) -> tuple[Parity | None, list[Row]]:
    """Parity and the outputs of each row; without parity, of the first two rows, if the target cannot run here."""
    module, rows = request.module, request.inputs.rows
    if not target.runs_here:
        return None, eager_rows(module, rows[:2])
    locate = locator(module, target, allowed)
    compared = verify.compare(partial, module, rows, method=module.name, data=data, locate=locate)
    parity = compared.parity(len(rows), allowed_difference(module) if allowed is None else allowed, "input")
    verify.check_values(
        parity.outputs, parity.max_relative_allowed, lambda: locate(compared.worst), program=module.name
    )
    return parity, compared.results
