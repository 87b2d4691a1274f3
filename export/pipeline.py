"""Export a model: check it, lower it, write the program, and compare it with the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgetune.adapt.low_rank import LowRank
from edgetune.capture import dynamic
from edgetune.capture.dynamic import Dynamic
from edgetune.capture.narrow import TORCH_DTYPES
from edgetune.capture.operators import delegated_pct
from edgetune.capture.positional import Positional
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.floats import FloatType, check_types
from edgetune.core.inputs import Inputs, tensors_of
from edgetune.core.modes import preserve_buffers
from edgetune.core.parity import Parity
from edgetune.core.quiet import silence_libraries
from edgetune.core.registry import installed_version, require
from edgetune.export import targets
from edgetune.export.adapters import as_program_with, prove_each, read_adapters, split_files
from edgetune.export.locate import locate_difference
from edgetune.export.lower import DEFAULT_LAYOUT, Layout, Lowered, check_finalized, lower
from edgetune.export.program_inputs import ProgramInputs, check_batch_first, names_of, prepare_inputs, specs_of
from edgetune.export.side_paths import AdaptedProgram
from edgetune.export.targets.target import Target
from edgetune.program.artifact import Artifact, write_pair
from edgetune.program.card import write_card
from edgetune.program.carried import Carried, ScaledValue, write_tokenizer
from edgetune.program.manifest import (
    AdaptersSpec,
    Call,
    GuardSpec,
    LanguageSpec,
    Manifest,
    MemoryPlan,
    ProgramKind,
    TensorSpec,
    TrainingSpec,
    data_file,
    data_path,
)
from edgetune.program.program_files import check_program_path, sha256_of
from edgetune.runtime import forks, verify
from edgetune.runtime.allowed import STATIC_INT8, allowed_difference
from edgetune.runtime.ties import measure_ties
from edgetune.runtime.verify import Bounds, Row

TIED_ROWS = 8  # on which the model is compared with itself


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
    one_row: bool = False,
    layout: Layout = DEFAULT_LAYOUT,
    dtype: FloatType = "fp32",
    adapters: Mapping[str, str | Path] | None = None,
    form: str = "inputs",
    adapter_rank: int | None = None,
) -> Artifact:
    """See `edgetune.export.export`."""
    check_types(dtype)
    chosen = choose_target(path, device, target)
    check_finalized(model)
    sides = read_adapters(adapters, form, adapter_rank, model, chosen, dtype)
    if sides is not None and sides.form == "files":
        layout = replace(layout, external_data=True)
    floats = TORCH_DTYPES[dtype]
    axes = dynamic.axes_of(sizes or {}, names_of(example_inputs), tensors_of(example_inputs))
    inputs = prepare_inputs(example_inputs, check_inputs, axes, one_row=one_row)
    if chosen.runs_here:
        forks.prepare()  # it imports while this process lowers
    with as_program_with(sides, model, example_inputs) as program:
        given = inputs if sides is None else sides.extend(inputs)
        check_narrow(program, floats)
        names = output_names(program, given.example)
        if isinstance(program, AdaptedProgram):
            program.paths.check_used()
        with preserve_buffers(program):
            if given.batch is not None:
                check_batch_first(program, given.batch)
        with preserve_buffers(program):
            lowered = lower(program, given.example, chosen, axes, layout, floats)
        files = split_files(sides, lowered.weights)
        lowered = replace(lowered, weights=files.weights)

        def prove(partial: Path) -> Manifest:
            data = data_path(partial) if lowered.weights else None

            def prove_with(adapter: LowRank | None, data: Path | None) -> tuple[Parity | None, list[Row]]:
                rows = inputs if sides is None else sides.rows_for(program, inputs, adapter)
                with advise_on(dtype):
                    return _prove(partial, program, rows, chosen, bounds, data, tolerance_of(carried), floats)

            (parity, outputs), section = prove_each(sides, files, data, path, prove_with)
            least = outputs[1] if axes else outputs[0]
            specs = specs_of(outputs[0], names, least)
            call = call_of("forward", lowered, given.specs, specs, parity, io_in_plan=layout.io_in_plan)
            beside = None if carried is None else write_tokenizer(carried, path)
            sections: dict[str, Any] = {"dtype": dtype, "carried": beside, "adapters": section}
            return manifest_of("model", lowered, (call,), chosen, device, path, **sections)

        manifest = write_pair(path, lowered.data, prove, lowered.weights, files.beside(path))
    if carried is not None:
        write_card(path, manifest)
    return Artifact(path=path, manifest=manifest)


def choose_target(path: Path, device: str | None, target: str | None) -> Target:
    """The target to lower for. Raises `EdgetuneError` if this machine cannot lower to it."""
    with silence_libraries():
        require("executorch", "export")
    check_program_path(path)
    chosen = targets.for_device(device, target)
    chosen.partitioners()  # raises if something is missing
    return chosen


def check_narrow(model: nn.Module, dtype: torch.dtype) -> None:
    """Raise for a model that cannot be written in 16-bit floats: one in integers, or in 16 bits already."""
    if dtype == torch.float32:
        return
    halves = {t.dtype for t in (*model.parameters(), *model.buffers())} & set(TORCH_DTYPES.values()) - {torch.float32}
    if halves:
        raise EdgetuneError(
            "the model computes in 16 bits already",
            got=", ".join(sorted(str(half).removeprefix("torch.") for half in halves)),
            action="leave dtype out, or call model.float(): the program is then compared with that",
            exit_code=Exit.EXPORT,
        )
    if allowed_difference(model) >= STATIC_INT8:
        raise EdgetuneError(
            "the model is quantized to static int8: its layers pass integers on, and hold no floats to write in 16 "
            "bits",
            action="leave dtype out, or export the model before it is quantized",
            exit_code=Exit.EXPORT,
        )


@contextmanager
def advise_on(dtype: FloatType) -> Iterator[None]:
    """Inside, an error says that the program computes in 16 bits, and which type to take instead."""
    try:
        yield
    except EdgetuneError as error:
        if dtype == "fp16":
            error.what = f"in fp16, whose largest number is 65,504: {error.what}"
            error.action = f"export it with dtype: bf16, which has the range of fp32; or {error.action}"
        elif dtype == "bf16":
            error.what = f"in bf16, with 8 bits of mantissa: {error.what}"
            error.action = f"leave dtype out, or {error.action}"
        raise


def output_names(program: nn.Module, example: Row) -> tuple[str, ...]:
    """The names of the outputs. Raises if the model does not run, or returns anything but tensors."""
    try:
        with silence_libraries(), preserve_buffers(program), torch.no_grad():
            return tuple(verify.eager_outputs(program, example))
    except EdgetuneError:
        raise
    except Exception as error:  # the model's own code
        raise EdgetuneError(
            f"the model does not run on the example inputs: {type(error).__name__}: {str(error).strip()[:500]}",
            got=[tuple(tensor.shape) for tensor in example],
            action="pass inputs that the model takes in eval mode, named as in model.forward",
            exit_code=Exit.EXPORT,
        ) from error


def _prove(
    partial: Path,
    program: Positional,
    inputs: ProgramInputs,
    target: Target,
    bounds: Bounds,
    data: Path | None,
    same_within: float | None,
    dtype: torch.dtype,
) -> tuple[Parity | None, list[Row]]:
    """Parity and the outputs of each row; without parity, of the first two rows, if the target cannot run here."""
    if not target.runs_here:
        return None, eager_rows(program, inputs.rows[:2])
    mask = program.names.index("attention_mask") if "attention_mask" in program.names else None
    locate = locator(program, target, bounds.max_relative_difference, dtype)
    compared = verify.compare(
        partial, program, inputs.rows, mask=mask, data=data, tries=inputs.tries, locate=locate, same_within=same_within
    )
    parity = compared.parity(len(inputs.rows), allowed_difference(program, dtype), inputs.counted)
    with silence_libraries(), preserve_buffers(program), torch.no_grad():
        ties = measure_ties(
            program, inputs.rows[:TIED_ROWS], lambda row: verify.eager_outputs(program, row), same_within
        )
    parity = parity.model_copy(update={"ties": ties})
    verify.check(parity, bounds, lambda: locate(compared.worst))
    return parity, compared.results


def tolerance_of(carried: Carried | None) -> float | None:
    """How far a predicted number may be from the model's and still count as the same; `None` for classes."""
    postprocessing = carried.postprocessing if carried is not None else None
    return postprocessing.same_within if isinstance(postprocessing, ScaledValue) else None


def eager_rows(program: nn.Module, rows: Sequence[Row]) -> list[Row]:
    """The model's outputs for each row."""
    with silence_libraries(), preserve_buffers(program), torch.no_grad():
        return [tuple(verify.eager_outputs(program, row).values()) for row in rows]


def locator(
    program: nn.Module, target: Target, allowed: float | None, dtype: torch.dtype = torch.float32
) -> verify.Locate:
    """A function that locates the module in which a row's difference begins (see `locate_difference`)."""
    bound = allowed_difference(program, dtype) if allowed is None else allowed
    return lambda row: locate_difference(program, row, target, bound, dtype)


def call_of(
    name: str,
    lowered: Lowered,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    parity: Parity | None = None,
    *,
    label: str = "",
    io_in_plan: bool = True,
) -> Call:
    """The manifest entry of one lowered method, or of one kind of call of it."""
    macs_pct, operators_pct = delegated_pct(lowered.operators)
    plan = lowered.plan
    return Call(
        name=name,
        label=label,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        plan_bytes=lowered.plan_bytes,
        plan=plan and MemoryPlan(way=plan.chosen, tried_bytes=plan.tried_bytes, holds_io=io_in_plan),
        delegates=lowered.delegates,
        delegated_macs_pct=macs_pct,
        delegated_operators_pct=operators_pct,
        undelegated=lowered.undelegated,
        operators=lowered.operators,
        executed=lowered.executed,
        workspace_bytes=lowered.execution.workspace_bytes,
        folded=str(lowered.folded),
        parity=parity,
    )


def manifest_of(
    kind: ProgramKind,
    lowered: Lowered,
    calls: tuple[Call, ...],
    target: Target,
    device: str | None,
    path: Path,
    *,
    dtype: FloatType = "fp32",
    carried: Carried | None = None,
    language: LanguageSpec | None = None,
    training: TrainingSpec | None = None,
    adapters: AdaptersSpec | None = None,
    guard: GuardSpec | None = None,
    note: str = "",
) -> Manifest:
    """The manifest of the lowered program that will be at `path`, with these calls and sections."""
    not_run = "" if target.runs_here else f"lowered, not run: this machine has no {target.name} runtime"
    packages = ("torch", "executorch", "torchao", *(("transformers", "tokenizers") if language else ()), "edgetune")
    return Manifest(
        kind=kind,
        target=target.name,
        dtype=dtype,
        device=device,
        size_bytes=len(lowered.data),
        sha256=sha256_of(lowered.data),
        versions={package: installed_version(package) or "not installed" for package in packages},
        data=data_file(path, lowered.weights),
        note="; ".join(filter(None, (not_run, note))),
        carried=carried,
        language=language,
        training=training,
        adapters=adapters,
        guard=guard,
        calls=calls,
    )
