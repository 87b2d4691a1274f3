"""Read what a `.pte` contains, from the file and from the `model.json` next to it."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.numbers import format_size
from edgetune.core.parity import Parity
from edgetune.core.quiet import silence_libraries
from edgetune.core.registry import require
from edgetune.export import external_weights
from edgetune.program.inspection import Beside, Constant, Count, Delegate, FileShare, Inspection, Method, Slot
from edgetune.program.manifest import DataFile, Manifest, TrainingParity, data_path, manifest_path, stored_manifest
from edgetune.program.program_files import program_at, sha256_of

PACKED_AGAIN = "each method or module that is loaded packs the base again, unless the runtime's weight cache is on"
_IDENTIFIER = slice(4, 8)  # of a flatbuffer; executorch's are ET12 and the like
_HEADER = slice(8, 40)
_DTYPES = {
    "BYTE": "uint8", "CHAR": "int8", "SHORT": "int16", "INT": "int32", "LONG": "int64", "HALF": "float16",
    "FLOAT": "float32", "DOUBLE": "float64", "BOOL": "bool", "BFLOAT16": "bfloat16", "UINT16": "uint16",
    "UINT32": "uint32", "UINT64": "uint64",
}  # fmt: skip


def inspect(path: str | Path) -> Inspection:
    """Inspect the `.pte` at `path`. It is read in Python, because a damaged file can crash the runtime.

    Raises `EdgetuneError` (exit code 2) if there is no such file, and (5) if it is not an ExecuTorch program, or is
    damaged.
    """
    path = program_at(Path(path))
    data = path.read_bytes()
    program, header = _read_program(path, data)
    try:
        return _describe_program(path, data, program, header)
    except EdgetuneError:  # from a file next to it
        raise
    except (IndexError, AttributeError, TypeError, ValueError) as error:  # invalid references
        raise _damage_error(path, f"{type(error).__name__}: {error}") from error


def _read_program(path: Path, data: bytes) -> tuple[Any, Any]:
    """The flatbuffer as executorch's dataclasses, and the header with the positions of the segments."""
    if not data[_IDENTIFIER].startswith(b"ET"):
        raise EdgetuneError(
            "this is not an ExecuTorch program",
            where=str(path),
            action="pass a .pte that `edgetune export` wrote",
            exit_code=Exit.EXPORT,
        )
    with silence_libraries():
        require("executorch", "inspecting a program")
        from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program
        from executorch.exir._serialize._program import _ExtendedHeader

    header = _ExtendedHeader.from_bytes(data[_HEADER].ljust(_HEADER.stop - _HEADER.start, b"\0"))
    if not header.is_valid():  # a program without segments has no header
        header.program_size, header.segment_base_offset, header.segment_data_size = len(data), 0, 0
    size = max(header.program_size, header.segment_base_offset + header.segment_data_size)
    if size > len(data):
        raise _damage_error(path, f"its header states {size} bytes, but the file has {len(data)}")
    try:
        program = _flatbuffer_to_program(data[: header.program_size])
    except Exception as error:  # the generated reader raises whatever its slices run into
        raise _damage_error(path, f"{type(error).__name__}: {error}") from error
    for segment in program.segments or ():
        if header.segment_base_offset + segment.offset + segment.size > len(data):
            raise _damage_error(path, "a segment ends after the file")
    return program, header


def _damage_error(path: Path, why: str) -> EdgetuneError:
    return EdgetuneError(
        f"the program is damaged or from another executorch version: {why}",
        where=str(path),
        action="export the model again, and copy the complete file",
        exit_code=Exit.EXPORT,
    )


def _describe_program(path: Path, data: bytes, program: Any, header: Any) -> Inspection:
    digest = hashlib.sha256(data).hexdigest()
    inside = _constants(program)
    constants = sorted([*inside, *_external_constants(path, inside)], key=lambda constant: -constant.size_bytes)
    return Inspection(
        path=str(path),
        size_bytes=len(data),
        sha256=digest,
        schema_version=program.version,
        methods=tuple(_method(program, plan) for plan in program.execution_plan),
        constants=tuple(constants),
        parts=_parts(len(data), program, header),
        beside=_read_manifest(manifest_path(path), digest),
    )


def _method(program: Any, plan: Any) -> Method:
    calls: Counter[int] = Counter()
    kernels: Counter[str] = Counter()
    for chain in plan.chains:
        for instruction in chain.instructions:
            arguments = instruction.instr_args
            if hasattr(arguments, "delegate_index"):
                calls[arguments.delegate_index] += 1
            elif hasattr(arguments, "op_index"):
                operator = plan.operators[arguments.op_index]
                kernels[".".join(filter(None, (operator.name, operator.overload)))] += 1
    if any(arena < 0 for arena in plan.non_const_buffer_sizes):
        raise ValueError(f"the memory plan of {plan.name} has a negative size")
    delegates = tuple(
        Delegate(
            backend=delegate.id,
            size_bytes=_delegate_bytes(program, delegate),
            calls=calls[index],
            settings=tuple(spec.key for spec in delegate.compile_specs or ()),
        )
        for index, delegate in enumerate(plan.delegates or ())
    )
    return Method(
        name=plan.name,
        inputs=tuple(_slot(plan.values[index].val) for index in plan.inputs or ()),
        outputs=tuple(_slot(plan.values[index].val) for index in plan.outputs or ()),
        operators=tuple(Count(name=name, count=count) for name, count in kernels.most_common()),
        delegates=delegates,
        arenas_bytes=tuple(plan.non_const_buffer_sizes[1:]),  # the first is for the constants
    )


def _slot(value: Any) -> Slot:
    kind = type(value).__name__.lower()
    if kind != "tensor":
        return Slot(kind="list" if kind.endswith("list") else kind)
    dynamic = int(value.shape_dynamism) != 0
    return Slot(kind="tensor", dtype=_dtype(value), shape=tuple(value.sizes or ()), dynamic=dynamic)


def _dtype(tensor: Any) -> str:
    name = str(tensor.scalar_type.name)
    return _DTYPES.get(name, name.lower())


def _delegate_bytes(program: Any, delegate: Any) -> int:
    reference = delegate.processed
    if int(reference.location) == 0:
        return len(program.backend_delegate_data[reference.index].data)
    return int(program.segments[reference.index].size)


def _constants(program: Any) -> list[Constant]:
    """Every constant once, even if several methods or operators read it."""
    constants: dict[tuple[str, object], Constant] = {}
    for plan in program.execution_plan:
        for value in plan.values:
            tensor = value.val
            if type(tensor).__name__ != "Tensor":
                continue
            extra = tensor.extra_tensor_info
            external = extra is not None and int(extra.location) == 1
            if tensor.data_buffer_idx == 0 and not external:
                continue  # in the arena
            mutable = tensor.allocation_info is not None
            kind = "external" if external else "initial state" if mutable else "constant"
            qualified = (extra.fully_qualified_name if extra is not None else "") or ""
            key = (kind, qualified if external else tensor.data_buffer_idx)
            name = qualified or f"{kind} {tensor.data_buffer_idx}"
            dtype, shape = _dtype(tensor), tuple(tensor.sizes or ())
            size = math.prod(shape) * getattr(torch, dtype, torch.uint8).itemsize
            if key not in constants or constants[key].size_bytes < size:
                constants[key] = Constant(name=name, size_bytes=size, dtype=dtype, shape=shape, kind=kind)
    named = [
        Constant(name=entry.key, size_bytes=program.segments[entry.segment_index].size, kind="delegate's weight")
        for entry in program.named_data or ()
    ]
    return [*constants.values(), *named]


def _external_constants(path: Path, constants: list[Constant]) -> list[Constant]:
    """The weights of delegates: stored in the `.ptd` next to the program, which does not name them."""
    file = data_path(path)
    if not file.is_file():
        return []
    try:
        sizes = external_weights.read_sizes(file)
    except Exception as error:  # as above
        raise _damage_error(file, f"{type(error).__name__}: {error}") from error
    named = {constant.name for constant in constants if constant.kind == "external"}
    return [Constant(name=n, size_bytes=size, kind="external") for n, size in sizes.items() if n not in named]


def _parts(total: int, program: Any, header: Any) -> tuple[FileShare, ...]:
    """The file's bytes by use; a segment belongs to what refers to it."""
    uses: dict[int, str] = {}
    inline = sum(len(entry.data) for entry in program.backend_delegate_data or ())
    stored = sum(len(entry.storage) for entry in program.constant_buffer or ())
    if program.constant_segment is not None and program.constant_segment.offsets:
        uses[program.constant_segment.segment_index] = "constants"
    for state in program.mutable_data_segments or ():
        uses[state.segment_index] = "initial state"
    for entry in program.named_data or ():
        uses[entry.segment_index] = "delegates' weights"
    for plan in program.execution_plan:
        for delegate in plan.delegates or ():
            if int(delegate.processed.location) != 0:
                uses[delegate.processed.index] = "delegates"
    sizes: Counter[str] = Counter({"instructions": header.program_size - inline - stored})
    sizes.update({"delegates": inline, "constants": stored})
    constants = next((program.segments[index] for index, use in uses.items() if use == "constants"), None)
    for index, segment in enumerate(program.segments or ()):
        if segment is constants or not _contains(constants, segment):  # shared data counts once
            sizes[uses.get(index, "not referred to")] += segment.size
    sizes["alignment"] = total - sum(sizes.values())
    return tuple(FileShare(name=name, size_bytes=size) for name, size in sizes.most_common() if size)


def _contains(outer: Any, inner: Any) -> bool:
    """Whether a segment is a range of another one, as a tied embedding table is."""
    if outer is None:
        return False
    within = outer.offset <= inner.offset and inner.offset + inner.size <= outer.offset + outer.size
    return bool(within and inner.size)


def _read_manifest(path: Path, digest: str) -> Beside | None:
    """What the manifest adds, or why it cannot be read."""
    if not path.is_file():
        return None
    try:
        manifest = stored_manifest(path)
    except EdgetuneError as error:
        return Beside(path=str(path), problem=f"{error.what}; {error.action}")
    several = manifest.kind == "methods"
    main = manifest.training.parity if manifest.training is not None else manifest.main.parity
    guard = () if manifest.guard is None else (f"guard: {_format_parity(manifest.guard.call.parity)}",)
    return Beside(
        path=str(path),
        checksum_ok=manifest.sha256 == digest,
        target=manifest.target,
        device=manifest.device or "",
        versions=manifest.versions,
        delegated_macs_pct=None if several else manifest.main.delegated_macs_pct,
        parity="; ".join(f"{call.name}: {_format_parity(call.parity)}" for call in manifest.calls)
        if several
        else "; ".join((_format_parity(main), *guard)),
        note="; ".join(filter(None, (manifest.note, _describe_data(path, manifest.data)))),
        adapters=_describe_adapters(path, manifest),
    )


def _describe_adapters(path: Path, manifest: Manifest) -> tuple[tuple[str, str], ...]:
    """The adapters, their files, the size of everything, and what the runtime does with the base."""
    spec = manifest.adapters
    if spec is None:
        return ()
    kinds = {"inputs": "given as inputs of the program", "files": "loaded from files beside the base's"}
    rows = [("adapters", f"{len(spec.files)}, {kinds[spec.form]}; rank up to {spec.rank} on {len(spec.layers)} layers")]
    for one in spec.files:
        difference = None if one.parity is None else one.parity.max_relative_difference
        proof = "not run" if difference is None else f"within {difference:.1e} of the largest value"
        state = _checksum(path.with_name(one.file), one.sha256)
        rows.append(
            (f"adapter {one.name}", f"{one.file}, {format_size(one.size_bytes)}, {one.in_words}, {proof}, {state}")
        )
    change = "change those inputs" if spec.form == "inputs" else "load the program with another file"
    return (
        *rows,
        ("all files", format_size(manifest.total_bytes)),
        ("in memory", f"{PACKED_AGAIN}; for another adapter, {change}"),
    )


def _describe_data(path: Path, data: DataFile | None) -> str:
    """The file of external weights, and whether its checksum is the manifest's."""
    if data is None:
        return ""
    state = _checksum(path.with_name(data.file), data.sha256)
    return f"the weights are in {data.file}, {'which is missing' if state == 'missing' else state}"


def _checksum(file: Path, sha256: str) -> str:
    """Whether a file's checksum is that of the manifest, in words."""
    if not file.is_file():
        return "missing"
    return f"checksum {'ok' if sha256_of(file.read_bytes()) == sha256 else 'WRONG'}"


def _format_parity(parity: Parity | TrainingParity | None) -> str:
    if parity is None:
        return "lowered, not run"
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.4g}" for name, value in parity if isinstance(value, (int, float))
    )
