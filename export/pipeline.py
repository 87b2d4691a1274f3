"""Export from end to end: check, lower, write, prove, name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

from edgetune.export import targets, verify
from edgetune.export.artifact import Artifact, Manifest, TensorSpec, sha256_of, write_pair
from edgetune.export.lower import Lowered, Positional, as_program, check_plain, lower
from edgetune.export.operators import delegated_pct
from edgetune.export.targets import Target
from edgetune.export.verify import Bounds
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
) -> Artifact:
    """See `edgetune.export.export`."""
    with quiet():
        require("executorch", "export")
    if path.suffix != ".pte":
        raise EdgetuneError("a program's name ends in .pte", got=str(path), exit_code=Exit.USAGE)
    chosen = targets.for_device(device, target)
    chosen.partitioners()  # says what is missing before any work
    check_plain(model)
    example = _rows(example_inputs, "the example inputs")[0]
    rows = [row for inputs in check_inputs or [example_inputs] for row in _rows(inputs, "check_inputs", example)]
    with as_program(model, example_inputs) as program:
        lowered = lower(program, example, chosen)

        def prove(partial: Path) -> Manifest:
            parity, outputs = _prove(partial, program, rows, chosen, bounds)
            inputs = _specs(example, program.names or tuple(f"input_{i}" for i in range(len(example))))
            return _manifest(lowered, chosen, device, inputs, _specs(outputs, ("logits",)), parity)

        return Artifact(path=path, manifest=write_pair(path, lowered.data, prove))


def _prove(
    partial: Path, program: Positional, rows: list[tuple[Tensor, ...]], target: Target, bounds: Bounds
) -> tuple[Parity | None, tuple[Tensor, ...]]:
    if not target.runs_here:
        with torch.inference_mode():
            return None, (program(*rows[0]),)
    mask = program.names.index("attention_mask") if "attention_mask" in program.names else None
    parity, outputs = verify.compare(partial, program, rows, mask)
    verify.check(parity, bounds)
    return parity, outputs


def _rows(inputs: Inputs, what: str, like: tuple[Tensor, ...] | None = None) -> list[tuple[Tensor, ...]]:
    """Every row of a batch as positional tensors of batch 1, in memory order."""
    tensors = tensors_of(inputs)
    if not tensors or any(t.dim() == 0 or t.shape[0] == 0 for t in tensors):
        raise EdgetuneError(f"{what} must be tensors with at least one row, batch first", exit_code=Exit.EXPORT)
    rows = [
        tuple(t.detach().cpu().contiguous() for t in tensors_of(rows_of(inputs, i, i + 1)))
        for i in range(tensors[0].shape[0])
    ]
    shapes = [tuple((tuple(t.shape), t.dtype) for t in row) for row in rows]
    wanted = tuple((tuple(t.shape), t.dtype) for t in like) if like is not None else shapes[0]
    for shape in shapes:
        if shape != wanted:
            raise EdgetuneError(
                f"{what}: a row has other shapes or types than the program takes",
                got=[(s, str(d)) for s, d in shape],
                allowed=[str([(s, str(d)) for s, d in wanted])],
                action="pad every row to the length of the example",
                exit_code=Exit.EXPORT,
            )
    return rows


def _specs(tensors: tuple[Tensor, ...], names: tuple[str, ...]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name=name, shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
        for name, tensor in zip(names, tensors, strict=True)
    )


def _manifest(
    lowered: Lowered,
    target: Target,
    device: str | None,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    parity: Parity | None,
) -> Manifest:
    macs_pct, operators_pct = delegated_pct(lowered.operators)
    return Manifest(
        target=target.name,
        device=device,
        inputs=inputs,
        outputs=outputs,
        size_bytes=len(lowered.data),
        plan_bytes=lowered.plan_bytes,
        sha256=sha256_of(lowered.data),
        versions={name: version_of(name) for name in ("torch", "executorch", "torchao", "edgetune")},
        delegates=lowered.delegates,
        delegated_macs_pct=macs_pct,
        delegated_operators_pct=operators_pct,
        leftovers=lowered.leftovers,
        operators=lowered.operators,
        parity=parity,
        folded=str(lowered.folded),
        note="" if target.runs_here else f"lowered, not run: this machine has no {target.name} runtime",
    )


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
