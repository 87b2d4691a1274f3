"""The adapters next to a program: find one by name, check that it fits, and read it as the program takes it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.other_names import nearest_file
from edgetune.core.registry import require
from edgetune.program.manifest import AdapterForm, AdaptersSpec, Manifest
from edgetune.program.tensor_data import Weight, merge_tensor_data, read_tensor_data

SUFFIXES: dict[AdapterForm, str] = {"inputs": ".safetensors", "files": ".ptd"}  # methods have no files
SIGNATURE = "edgetune.signature"  # in the metadata of a safetensors file; a key of a `.ptd`, which has none

Adapter = str | Path | None
"""The name of an adapter in the manifest, or the path of another file for the same program; `None`: the base."""


def adapter_path(path: Path, name: str, form: AdapterForm) -> Path:
    """`model.en.safetensors` or `model.en.ptd` for `model.pte`."""
    return path.with_name(f"{path.stem}.{name}{SUFFIXES[form]}")


def adapter_tensors(path: Path, manifest: Manifest, adapter: Adapter) -> tuple[Tensor, ...]:
    """The inputs of the program at `path` that hold an adapter, in order; none if it takes none."""
    spec = _spec_for(path, manifest, adapter)
    if spec is None or not spec.inputs:
        return ()
    if adapter is None:
        return tuple(torch.zeros(one.shape) for one in spec.inputs)
    file = _find(path, spec, adapter)
    try:
        with require("safetensors", "lora").safe_open(file, "pt") as opened:
            signature = (opened.metadata() or {}).get(SIGNATURE)
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  no mapping
    except Exception as error:  # the reader's own errors
        raise EdgetuneError(f"the adapter cannot be read: {error}", where=str(file), exit_code=Exit.EXPORT) from error
    _check_signature(file, signature, spec)
    return tuple(tensors[one.name].contiguous() for one in spec.inputs)


@contextmanager
def data_with_adapter(path: Path, manifest: Manifest, adapter: Adapter) -> Iterator[Path | None]:
    """The data file for the program at `path`, with the adapter in it; `None` if all is in the program.

    Python's runtime loads one data file, so a temporary one holds base and adapter. A file, not bytes in memory: the
    runtime does not own what it reads.
    """
    data = path.with_name(manifest.data.file) if manifest.data is not None else None
    spec = _spec_for(path, manifest, adapter)
    if spec is None or spec.form != "files":
        yield data
        return
    if adapter is None:
        raise EdgetuneError(
            "the program needs one of its adapters",
            where=str(path),
            allowed=[file.name for file in spec.files],
            action="name one: adapter=..., or --adapter",
        )
    file = _find(path, spec, adapter)
    try:
        signature = read_tensor_data(file).get(SIGNATURE, Weight(b"")).data.decode()
    except ValueError as error:
        raise EdgetuneError(f"the adapter cannot be read: {error}", where=str(file), exit_code=Exit.EXPORT) from error
    _check_signature(file, signature, spec)
    assert data is not None  # the base's weights, which the form keeps apart
    with tempfile.TemporaryDirectory(prefix="edgetune-") as folder:
        merged = Path(folder, data.name)
        merged.write_bytes(merge_tensor_data(data, file))
        yield merged


def _spec_for(path: Path, manifest: Manifest, adapter: Adapter) -> AdaptersSpec | None:
    if adapter is not None and manifest.adapters is None:
        raise EdgetuneError(
            "the program has no adapters",
            where=str(path),
            got=str(adapter),
            action="leave the adapter out, or export the base with adapters={...}",
        )
    return manifest.adapters


def _find(path: Path, spec: AdaptersSpec, adapter: str | Path) -> Path:
    names = {one.name: one.file for one in spec.files}
    if adapter in names:
        return path.with_name(names[str(adapter)])
    file = Path(adapter)
    if file.suffix == SUFFIXES[spec.form] and file.is_file():
        return file
    near = nearest_file(file) if file.suffix else None
    raise EdgetuneError("the program has no such adapter", where=str(path), got=str(adapter), allowed=names, near=near)


def _check_signature(file: Path, signature: str | None, spec: AdaptersSpec) -> None:
    if signature != spec.signature:
        raise EdgetuneError(
            "the adapter is for another base, or for a program with other layers or ranks",
            where=str(file),
            got=signature or "no signature",
            allowed=[spec.signature],
            action="export the base with this adapter in adapters={...}",
            exit_code=Exit.EXPORT,
        )
