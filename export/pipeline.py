"""Export from end to end: check, lower, write, prove, name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from edgetune.export import dynamic, forks, targets, verify
from edgetune.export.artifact import (
    Artifact,
    Lowering,
    Manifest,
    OfFile,
    Plan,
    TensorSpec,
    admitted,
    data_path,
    described_data,
    sha256_of,
    write_pair,
)
from edgetune.export.card import write_card
from edgetune.export.carried import Carried, write_beside
from edgetune.export.dynamic import Axis, Dynamic
from edgetune.export.lower import PLAIN, Layout, Lowered, Positional, as_program, check_plain, lower
from edgetune.export.operators import delegated_pct
from edgetune.export.targets import Target
from edgetune.export.verify import Bounds, Row
from edgetune.ledger import Parity
from edgetune.quiet import quiet
from edgetune.registry import require
from edgetune.technique import EdgetuneError, Exit, Inputs, rows_of, tensors_of

__all__ = ["Bounds", "export_program"]


def export_program(
    model: nn.Module,
    example_inputs: Inputs,
    path: Path,
    *,
    device: str | None,
    target: str | None,
    check_inputs: Sequence[Inputs] | None,
    bounds: Bounds,
    carried: Carried | None = None,
    sizes: Dynamic | None = None,
    layout: Layout = PLAIN,
) -> Artifact:
    """See `edgetune.export.export`."""
    chosen = chosen_target(path, device, target)
    check_plain(model)
    axes = dynamic.axes_of(sizes or {}, names_of(example_inputs), tensors_of(example_inputs))
    inputs, example, rows = _rows(example_inputs, check_inputs, axes)
    if chosen.runs_here:
        forks.prepare()  # it imports while this process lowers
    with as_program(model, example_inputs) as program:
        lowered = lower(program, example, chosen, axes, layout)

        def prove(partial: Path) -> Manifest:
            data = data_path(partial) if lowered.weights else None
            parity, outputs = _prove(partial, program, rows, chosen, bounds, data)
            least = outputs[1] if axes else outputs[0]
            return Manifest(
                **dict(of_file(lowered, chosen, device, path)),
                **dict(lowering_of(lowered, layout)),
                inputs=inputs,
                outputs=specs_of(outputs[0], ("logits",), least),
                parity=parity,
                carried=None if carried is None else write_beside(carried, path),
            )

        manifest = write_pair(path, lowered.data, prove, lowered.weights)
    if carried is not None:
        write_card(path, manifest)
    return Artifact(path=path, manifest=manifest)


def chosen_target(path: Path, device: str | None, target: str | None) -> Target:
    """The target to lower for, once it is known that this machine can."""
    with quiet():
        require("executorch", "export")
    if path.suffix != ".pte":
        raise EdgetuneError("a program's name ends in .pte", got=str(path), exit_code=Exit.USAGE)
    chosen = targets.for_device(device, target)
    chosen.partitioners()  # says what is missing before any work
    return chosen


def _prove(
    partial: Path, program: Positional, rows: list[Row], target: Target, bounds: Bounds, data: Path | None
) -> tuple[Parity | None, list[Row]]:
    """Parity and the outputs of each row; of the first two alone where this machine cannot run the target."""
    if not target.runs_here:
        with torch.inference_mode():
            return None, [(program(*row),) for row in rows[:2]]
    mask = program.names.index("attention_mask") if "attention_mask" in program.names else None
    parity, outputs = verify.compare(partial, program, rows, mask, data)
    verify.check(parity, bounds)
    return parity, outputs


def names_of(inputs: Inputs) -> tuple[str, ...]:
    """The names of the inputs as a manifest states them."""
    return tuple(inputs) if isinstance(inputs, dict) else tuple(f"input_{i}" for i in range(len(tensors_of(inputs))))


def _rows(
    example_inputs: Inputs, check_inputs: Sequence[Inputs] | None, axes: Sequence[Axis]
) -> tuple[tuple[TensorSpec, ...], Row, list[Row]]:
    """What the program takes, an example in its greatest sizes, and the rows to compare on.

    With free axes the rows come first in the sizes of `dynamic.sizes_to_check`, the greatest and then the least at
    the head, and after that as they were given.
    """
    whole = any(axis.dim == 0 for axis in axes)  # a free batch is not taken apart
    names = names_of(example_inputs)
    example = _split(example_inputs, "the example inputs", whole)
    inputs = free_specs(example[0], names, axes)
    given = example if check_inputs is None else []
    for some in check_inputs or ():
        given += [admitted(inputs, row, "check_inputs") for row in _split(some, "check_inputs", whole)]
    if not axes:
        return inputs, example[0], [admitted(inputs, row, "the example inputs") for row in given]
    seen = [*given, *example]
    sized = [dynamic.resized(seen[i % len(seen)], axes, sizes) for i, sizes in enumerate(dynamic.sizes_to_check(axes))]
    return inputs, sized[0], [*sized, *given] if check_inputs is not None else sized


def _split(inputs: Inputs, what: str, whole: bool) -> list[Row]:
    """Every row of a batch as positional tensors of batch 1, in memory order; or all of it as one."""
    tensors = tensors_of(inputs)
    if not tensors or any(t.dim() == 0 or t.shape[0] == 0 for t in tensors):
        raise EdgetuneError(f"{what} must be tensors with at least one row, batch first", exit_code=Exit.EXPORT)
    rows = [inputs] if whole else [rows_of(inputs, i, i + 1) for i in range(tensors[0].shape[0])]
    return [tuple(t.detach().cpu().contiguous() for t in tensors_of(row)) for row in rows]


def specs_of(tensors: Row, names: tuple[str, ...], least: Row | None = None) -> tuple[TensorSpec, ...]:
    """The tensors as a manifest states them; `least` are the same in the smallest sizes."""
    found = []
    for name, tensor, small in zip(names, tensors, least or tensors, strict=True):
        shape, low = tuple(tensor.shape), tuple(small.shape)
        dtype = str(tensor.dtype).removeprefix("torch.")
        found.append(TensorSpec(name=name, shape=shape, dtype=dtype, smallest=low if low != shape else None))
    return tuple(found)


def free_specs(example: Row, names: tuple[str, ...], axes: Sequence[Axis]) -> tuple[TensorSpec, ...]:
    """The inputs that a program with these axes takes."""
    if not axes:
        return specs_of(example, names)
    high, low = dynamic.sizes_to_check(axes)[:2]
    found = specs_of(dynamic.resized(example, axes, high), names, dynamic.resized(example, axes, low))
    return tuple(
        spec.model_copy(update={"free": {axis.dim: axis.name for axis in axes if axis.place == place}})
        for place, spec in enumerate(found)
    )


def of_file(lowered: Lowered, target: Target, device: str | None, path: Path) -> OfFile:
    """The file with these bytes, whose name will be `path`, as a manifest states it."""
    return OfFile(
        target=target.name,
        device=device,
        size_bytes=len(lowered.data),
        sha256=sha256_of(lowered.data),
        versions=versions(),
        data=described_data(path, lowered.weights),
        note=note_of(target),
    )


def lowering_of(lowered: Lowered, layout: Layout) -> Lowering:
    """One lowered method as a manifest states it."""
    macs_pct, operators_pct = delegated_pct(lowered.operators)
    plan = lowered.plan
    return Lowering(
        plan_bytes=lowered.plan_bytes,
        plan=plan and Plan(way=plan.taken, tried_bytes=plan.tried_bytes, holds_io=layout.holds_io),
        delegates=lowered.delegates,
        delegated_macs_pct=macs_pct,
        delegated_operators_pct=operators_pct,
        leftovers=lowered.leftovers,
        operators=lowered.operators,
        executed=lowered.executed,
        folded=str(lowered.folded),
    )


def note_of(target: Target) -> str:
    """What a manifest says of a program that this machine cannot run."""
    return "" if target.runs_here else f"lowered, not run: this machine has no {target.name} runtime"


def versions() -> dict[str, str]:
    """The packages that make a program what it is."""
    return {name: version_of(name) for name in ("torch", "executorch", "torchao", "edgetune")}


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
