"""Rows of tensors on disk: each has a fixed position in a file, and is valid only if its checksum matches.

A cache is a folder named by its key:

    about.json       what the key was computed from; written last, so a folder without it was never finished
    tensor-0.bin     the rows of the first tensor, one after the other, each as long as the row is
    rows.bin         for each row a digest of its inputs and a checksum, 16 bytes each; zeros: not stored yet
    use-*.lock       held by each process that has the cache open

The checksum covers the row's number, its inputs and every byte of its tensors: a row half written, mixed from two
writers or damaged on the disk does not match and counts as missing. So a kill needs no clean-up, and any number of
processes may use one cache at once. The files are read, not mapped: mapped pages would count as memory of the process,
and a full disk would end it with a signal instead of an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.files import write_atomically
from edgetune.core.numbers import MIB
from edgetune.core.registry import require

_ABOUT = "about.json"
_DIGEST_BYTES = 16
_EMPTY = bytes(2 * _DIGEST_BYTES)


class RowStore:
    """The rows of one cache, created or reused by `open`. `sizes[t][r]`: the bytes of row r of tensor t."""

    def __init__(self, folder: Path, sizes: Sequence[Sequence[int]], lock: Any) -> None:
        self.folder, self.lock = folder, lock
        self.sizes = [np.asarray(each, dtype=np.int64) for each in sizes]
        self.offsets = [np.concatenate([[0], np.cumsum(each)]) for each in self.sizes]
        self.files: list[BinaryIO] = [
            open(folder / f"tensor-{n}.bin", "r+b", buffering=0)  # noqa: SIM115
            for n in range(len(sizes))
        ]
        self.rows_file: BinaryIO = open(folder / "rows.bin", "r+b", buffering=0)  # noqa: SIM115
        self.verified = np.zeros(len(self.sizes[0]), dtype=bool)  # by this process, once for each row
        self.damaged: set[int] = set()  # rows whose checksum did not hold

    @classmethod
    def open(
        cls, folder: Path, about: Mapping[str, Any], sizes: Sequence[Sequence[int]], max_mib: float, smaller: str
    ) -> RowStore:
        """The cache with the key of `about`, with space for all its rows.

        All caches in `folder` together take at most `max_mib`: the least recently used are removed, but none that
        another process has open. `smaller` is the advice of the error if there is not enough space.
        """
        filelock = require("filelock", "a cached prefix")
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
        place, needed = folder / key, needed_bytes(sizes)
        if needed > max_mib * MIB:
            raise EdgetuneError(
                f"the cached prefix of {len(sizes[0])} rows needs {needed / MIB:.1f} MiB, "
                f"more than cache_max_mib ({max_mib:g})",
                action=f"set cache_max_mib to {-(-needed // MIB)}, {smaller}, or leave cache_prefix out",
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder / "folder.lock"):
                _make_room(folder, place, needed, max_mib, filelock)
                _create(place, about, sizes)
                _in_use(place, filelock)
                lock = filelock.FileLock(place / f"use-{os.getpid()}-{uuid.uuid4().hex[:8]}.lock")
                lock.acquire()
                os.utime(place / _ABOUT)  # the least recently used one goes first
            return cls(place, sizes, lock)
        except OSError as error:
            raise _disk_error(place, error) from error

    def read(self, row: int) -> tuple[bytes, list[bytearray]] | None:
        """The digest of the row's inputs, and the bytes of its tensors; `None` if the row is missing or incomplete."""
        record = self._record(row)
        if record == _EMPTY:
            return None
        values = [self._bytes(tensor, row) for tensor in range(len(self.files))]
        if not self.verified[row]:
            if record[_DIGEST_BYTES:] != _checksum(row, record[:_DIGEST_BYTES], values):
                self.damaged.add(row)
                return None
            self.verified[row] = True
        return record[:_DIGEST_BYTES], values

    def inputs(self, row: int) -> bytes | None:
        """The digest of the row's inputs, without reading its tensors; `None` if there is no row."""
        record = self._record(row)
        return None if record == _EMPTY else record[:_DIGEST_BYTES]

    def write(self, row: int, inputs: bytes, values: Sequence[bytes]) -> None:
        """Store one row. `inputs` is the digest of its inputs, 16 bytes; `values` are its tensors' bytes."""
        for tensor, value in enumerate(values):
            if len(value) != self.sizes[tensor][row]:
                raise EdgetuneError(f"row {row} takes {len(value)} bytes instead of {self.sizes[tensor][row]}")
        self.verified[row] = False
        try:
            for tensor, value in enumerate(values):
                _write_at(self.files[tensor], int(self.offsets[tensor][row]), value)
            _write_at(self.rows_file, row * len(_EMPTY), inputs + _checksum(row, inputs, values))
        except OSError as error:
            raise _disk_error(self.folder, error) from error

    @contextmanager
    def lock_for_writing(self) -> Iterator[None]:
        """Lock the cache for writing."""
        filelock = require("filelock", "a cached prefix")
        with filelock.FileLock(self.folder / "write.lock"):
            yield

    def clear(self) -> None:
        """Discard every row."""
        with self.lock_for_writing():
            _write_at(self.rows_file, 0, _EMPTY * len(self.verified))
        self.verified[:] = False

    def close(self) -> None:
        """Close the files; they stay on disk."""
        for file in (*self.files, self.rows_file):
            file.close()
        self.lock.release()
        Path(self.lock.lock_file).unlink(missing_ok=True)

    @property
    def mib(self) -> float:
        """Size of all rows together."""
        return needed_bytes(self.sizes) / MIB

    def _record(self, row: int) -> bytes:
        self.rows_file.seek(row * len(_EMPTY))
        record = self.rows_file.read(len(_EMPTY))
        return record if len(record) == len(_EMPTY) else _EMPTY

    def _bytes(self, tensor: int, row: int) -> bytearray:
        buffer = bytearray(int(self.sizes[tensor][row]))
        self.files[tensor].seek(int(self.offsets[tensor][row]))
        view, done = memoryview(buffer), 0
        while done < len(buffer):
            count = self.files[tensor].readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                break  # a file cut short: the rest stays zero, which the checksum finds
            done += count
        return buffer


def needed_bytes(sizes: Sequence[Sequence[int] | np.ndarray[Any, Any]]) -> int:
    """Size of a cache on disk with all rows."""
    return int(sum(int(np.sum(each)) for each in sizes)) + len(sizes[0]) * len(_EMPTY)


def _checksum(row: int, inputs: bytes, values: Sequence[bytes | bytearray]) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    digest.update(row.to_bytes(8, "little") + inputs)
    for value in values:
        digest.update(value)
    return digest.digest()


def _write_at(file: BinaryIO, offset: int, value: bytes) -> None:
    file.seek(offset)
    view = memoryview(value)
    while view:
        view = view[file.write(view) :]


def _create(place: Path, about: Mapping[str, Any], sizes: Sequence[Sequence[int]]) -> None:
    """Create the files with their full length, as holes that take no space yet; complete once `about.json` exists."""
    lengths = {f"tensor-{n}.bin": int(np.sum(each)) for n, each in enumerate(sizes)}
    lengths["rows.bin"] = len(sizes[0]) * len(_EMPTY)
    if (place / _ABOUT).exists() and all((place / name).exists() for name in lengths):
        return
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for name, length in lengths.items():
        with (place / name).open("wb") as file:
            file.truncate(length)
    write_atomically(place / _ABOUT, json.dumps(about, indent=1))


def _make_room(folder: Path, place: Path, needed: int, max_mib: float, filelock: Any) -> None:
    """Remove the least recently used caches until the limit is met, and check the free space on the disk."""
    others = [entry for entry in folder.iterdir() if entry.is_dir() and entry != place and _is_cache(entry)]
    others.sort(key=lambda entry: (entry / _ABOUT).stat().st_mtime if (entry / _ABOUT).exists() else 0.0)
    total = needed + sum(_bytes_of(entry) for entry in others)
    kept = 0
    for entry in others:
        if total <= max_mib * MIB and (entry / _ABOUT).exists():
            break
        size = _bytes_of(entry)
        if _in_use(entry, filelock):
            kept += size
            continue
        shutil.rmtree(entry)
        total -= size
    if total > max_mib * MIB:
        raise EdgetuneError(
            f"the cached prefix needs {needed / MIB:.1f} MiB, but other trainings use {kept / MIB:.1f} MiB of the "
            f"{max_mib:g} that cache_max_mib allows in {folder}",
            action="wait for them, or raise cache_max_mib",
        )
    there = sum(file.stat().st_blocks * 512 for file in place.glob("*.bin")) if place.is_dir() else 0
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise EdgetuneError(
            f"the cached prefix needs {(needed - there) / MIB:.1f} MiB, and there are {free / MIB:.1f} in {folder}",
            action="free some disk space, choose another folder, or leave cache_prefix out",
            exit_code=Exit.DATA,
        )


def _is_cache(entry: Path) -> bool:
    """Whether the folder is a cache: nothing else is ever removed."""
    return len(entry.name) == 24 and all(
        file.name in (_ABOUT, "rows.bin", "write.lock") or file.name.startswith(("tensor-", "use-", f".{_ABOUT}."))
        for file in entry.iterdir()
    )


def _bytes_of(entry: Path) -> int:
    return sum(file.stat().st_size for file in entry.glob("*.bin"))


def _in_use(entry: Path, filelock: Any) -> bool:
    """Whether a living process holds one of the locks; removes those of dead processes."""
    living = False
    for path in entry.glob("use-*.lock"):
        try:
            with filelock.FileLock(path, timeout=0):
                pass
            path.unlink(missing_ok=True)
        except filelock.Timeout:
            living = True
    return living


def _disk_error(place: Path, error: OSError) -> EdgetuneError:
    return EdgetuneError(
        f"the cached prefix cannot be written or read ({error.strerror or error})",
        got=str(place),
        action="free some disk space, choose another folder, or leave cache_prefix out",
        exit_code=Exit.DATA,
    )
