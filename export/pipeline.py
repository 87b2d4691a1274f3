"""Export from end to end: check, lower, write, prove, name."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

from edgetune.export import targets, verify
from edgetune.export.artifact import Artifact, Manifest, TensorSpec, sha256_of, write_pair
from edgetune.export.lower import Lowered, Positional, lower
from edgetune.export.targets import Target
from edgetune.export.verify import Bounds
from edgetune.ledger import Parity
from edgetune.profile.operators import Operator
from edgetune.quiet import quiet
from edgetune.registry import require
from edgetune.technique import EdgetuneError, Exit, Inputs, device_of, rows_of, shortened, tensors_of
from edgetune.wrapped import is_wrapped

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
    _check_plain(model)
    example = _rows(example_inputs, "the example inputs")[0]
    rows = [row for inputs in check_inputs or [example_inputs] for row in _rows(inputs, "check_inputs", example)]
    with _as_program(model, example_inputs) as program:
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


def _check_plain(model: nn.Module) -> None:
    """A weight that is computed in the forward pass is not seen as a constant and stays with slow kernels."""
    found = [name for name, layer in model.named_modules() if is_wrapped(layer)]
    if found:
        raise EdgetuneError(
            f"the model still has layers that carry something extra: {shortened(found, 4)}",
            action="fold them first: model = et.finalize(model)",
            exit_code=Exit.EXPORT,
        )


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


@contextlib.contextmanager
def _as_program(model: nn.Module, inputs: Inputs) -> Iterator[Positional]:
    """The model in eval mode, on the CPU and without a key-value cache; put back as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    config = getattr(model, "config", None)
    caches = getattr(config, "use_cache", None)
    try:
        model.eval()
        if caches:
            config.use_cache = False  # type: ignore[union-attr]
        here = model if device_of(model).type == "cpu" else copy.deepcopy(model).cpu()
        yield Positional(here, inputs).eval()
    finally:
        if caches:
            config.use_cache = caches  # type: ignore[union-attr]
        for module, training in modes.items():
            module.training = training


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
    taken = [operator for operator in lowered.operators if operator.delegated]
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
        delegated_macs_pct=_share(_macs(taken), _macs(lowered.operators)),
        delegated_operators_pct=_share(len(taken), len(lowered.operators)),
        leftovers=lowered.leftovers,
        operators=lowered.operators,
        parity=parity,
        folded=str(lowered.folded),
        note="" if target.runs_here else f"lowered, not run: this machine has no {target.name} runtime",
    )


def _macs(operators: Sequence[Operator]) -> int:
    return sum(operator.macs for operator in operators)


def _share(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else 0.0


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
