"""Checkpoints that survive a kill at any moment: safetensors and JSON, a completeness marker last, no pickle.

A checkpoint is a folder:

    complete.json                 the marker: name, size and sha256 of the two others
    tensors-<sha>.safetensors
    state-<sha>.json

Each file is written under a temporary name, flushed to disk and renamed; the marker is renamed into place last and
lists the other files. So a folder is either complete or has no marker, and overwriting a complete checkpoint keeps the
old one until the new one is complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.files import flush, replace_files

MARKER = "complete.json"
_FORMAT = 1
_PARTS = ("tensors", "state")
_FILES = re.compile(
    r"(\.complete\.[0-9a-f]{8}|complete)\.json|\.tensors\.safetensors|\.state\.json|(tensors|state)-[0-9a-f]{16}\.\w+"
)
_log = logging.getLogger(__name__)


def save(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write `tensors` and the JSON-able `state` into `folder`; an earlier checkpoint stays until the new one is
    complete.

    Tensors may share storage, be 0-dim, strided or of any dtype that safetensors supports; each is stored as a separate
    copy. Raises `EdgetuneError` if the disk is full or read-only, with the earlier checkpoint untouched.
    """
    folder = Path(folder)
    try:
        text = json.dumps(dict(state), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise EdgetuneError(f"this state cannot be written as JSON ({error})", action="pack() it first") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            "tensors": _write_hashed(
                folder, "tensors", ".safetensors", lambda path: save_file(_unshare(tensors), path)
            ),
            "state": _write_hashed(folder, "state", ".json", lambda path: path.write_text(text, encoding="utf-8")),
        }
        marker = json.dumps({"format": _FORMAT, **files}, indent=1)
        flush(folder)  # the marker comes once what it names is on the disk
        with replace_files(folder / MARKER) as (temporary,):
            temporary.write_text(marker, encoding="utf-8")
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        _remove_unnamed(folder)
        raise EdgetuneError(
            f"the checkpoint could not be written ({error})",
            got=str(folder),
            action="free some disk space or choose another folder, then resume: the previous checkpoint is intact",
        ) from error
    _remove_unnamed(folder)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the state of a complete checkpoint; anything else raises `EdgetuneError`."""
    folder = Path(folder)
    wrong = find_fault(folder)
    if wrong:
        raise EdgetuneError(
            f"this checkpoint cannot be used: {wrong}",
            got=str(folder),
            action="remove that folder and resume from an earlier one, or start again",
            exit_code=Exit.DATA,
        )
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    mapped = load_file(folder / marker["tensors"]["name"])
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}  # free of the file, which may be removed
    return tensors, json.loads((folder / marker["state"]["name"]).read_text(encoding="utf-8"))


def find_fault(folder: Path) -> str:
    """The problem of the checkpoint in `folder`, in a few words; empty if it is complete and unchanged."""
    path = folder / MARKER
    if not path.is_file():
        return f"it has no {MARKER}, so it was never finished"
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        if marker["format"] != _FORMAT:
            return f"its format is {marker['format']}, this version reads {_FORMAT}"
        entries = [(str(marker[part]["name"]), marker[part]["bytes"], marker[part]["sha256"]) for part in _PARTS]
    except (ValueError, KeyError, TypeError, OSError) as error:
        return f"{MARKER} cannot be read ({type(error).__name__}: {error})"
    for name, size, digest in entries:
        file = folder / name
        if Path(name).name != name or not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _sha256(file) != digest:
            return f"the checksum of {name} does not fit"
    return ""


def latest(parent: Path) -> Path | None:
    """The last complete checkpoint among the folders of `parent`, by name; others are logged and skipped."""
    for folder in reversed(_folders(Path(parent))):
        wrong = find_fault(folder)
        if not wrong:
            return folder
        _log.warning("checkpoint %s is skipped: %s", folder, wrong)
    return None


def remove_old(parent: Path, keep: int = 2) -> None:
    """Remove the unfinished checkpoints in `parent`, and all but the last `keep` finished ones.

    Other folders are left alone. Call it after `save`, so that the new one is complete.
    """
    finished = []
    for folder in _folders(Path(parent)):
        if (folder / MARKER).exists():
            finished.append(folder)
        else:
            _log.info("removing the unfinished checkpoint %s", folder)
            shutil.rmtree(folder)
    for folder in finished[: max(0, len(finished) - keep)]:
        (folder / MARKER).unlink()  # first, so that a half-removed folder is never taken for a checkpoint
        shutil.rmtree(folder)


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(entry for entry in parent.iterdir() if entry.is_dir() and _is_checkpoint(entry))


def _is_checkpoint(folder: Path) -> bool:
    """Whether the folder contains only a checkpoint's files, finished or not."""
    return all(entry.is_file() and _FILES.fullmatch(entry.name) for entry in folder.iterdir())


def _unshare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor contiguous, and copied if its storage is shared or only partly used."""
    storages: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        result[name] = plain
    return result


def _write_hashed(folder: Path, stem: str, suffix: str, write: Callable[[Path], object]) -> dict[str, Any]:
    """Write under a temporary name, flush, rename to a name with the checksum; returns its entry in the marker."""
    temporary = folder / f".{stem}{suffix}"
    write(temporary)
    flush(temporary)
    digest = _sha256(temporary)
    name = f"{stem}-{digest[:16]}{suffix}"
    size = temporary.stat().st_size
    os.replace(temporary, folder / name)
    return {"name": name, "bytes": size, "sha256": digest}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _remove_unnamed(folder: Path) -> None:
    """Remove checkpoint files that the marker does not list, and the folder if it is then empty."""
    try:
        named = {MARKER}
        if (folder / MARKER).exists():
            marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
            named |= {str(marker[part]["name"]) for part in _PARTS}
        for entry in list(folder.iterdir()):
            if _FILES.fullmatch(entry.name) and entry.name not in named:
                entry.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
    except (OSError, ValueError, KeyError) as error:  # the next `remove_old` tries again
        _log.warning("unlisted files in %s could not be removed: %s", folder, error)


def pack(value: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Split a tree of dicts, lists, tuples, numbers, strings and tensors into tensors and JSON.

    For optimizer state dicts and generator states: keys may be integers, floats may be infinite, tuples stay tuples.

    >>> tensors, tree = pack({0: (torch.ones(2), float("inf"))}, "optimizer/")
    >>> list(tensors), tree
    (['optimizer/0/0'], {'dict': [[0, {'tuple': [{'tensor': 'optimizer/0/0'}, {'float': 'inf'}]}]]})
    >>> unpack(tensors, tree)
    {0: (tensor([1., 1.]), inf)}
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _pack_value(value, prefix.rstrip("/"), tensors)


def _pack_value(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        while path in tensors:  # the keys 0 and "0" would share a path
            path += "'"
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, (list, tuple)):
        items = [_pack_value(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping):
        return {"dict": [[key, _pack_value(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    raise EdgetuneError("pack: this cannot be stored", where=path, got=type(value).__name__)


def unpack(tensors: Mapping[str, Tensor], tree: Any) -> Any:
    """The inverse of `pack`."""
    if isinstance(tree, list):
        return [unpack(tensors, item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, inside),) = tree.items()
    if kind == "tensor":
        return tensors[inside]
    if kind == "float":
        return float(inside)
    if kind == "tuple":
        return tuple(unpack(tensors, item) for item in inside)
    return {key: unpack(tensors, item) for key, item in inside}


def random_state() -> dict[str, Any]:
    """The states of the generators of torch (with accelerators), numpy and Python, for `pack`."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore the generators from `random_state`."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate(state["python"])
