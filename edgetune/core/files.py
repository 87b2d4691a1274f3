"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgetune.core.errors import EdgetuneError


@contextmanager
def replace_files(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """A temporary name beside each path of one folder, to write to; at the end the files are flushed and renamed.

    Readers see an old file or a whole new one, and the last path only where those before it are in place. Where the
    block raises, the temporary files go and what stood there stays. Suffixes are kept, and a stem that files share.
    """
    token = secrets.token_hex(4)
    temporary = tuple(path.with_name(f".{path.stem}.{token}{path.suffix}") for path in paths)
    try:
        if not paths[0].parent.is_dir():
            paths[0].parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for written in temporary:
            flush(written)
        for written, path in zip(temporary, paths, strict=True):
            os.replace(written, path)
        flush(paths[-1].parent)
    except BaseException:
        for written in temporary:
            written.unlink(missing_ok=True)
        raise


@contextmanager
def build_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `path` at the end; where the block raises, nothing is left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield unfinished
        for file in unfinished.rglob("*"):
            flush(file)
        unfinished.chmod(0o755)  # mkdtemp makes it private
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text by `replace_files`. Raises `EdgetuneError` where the disk is full or refuses."""
    try:
        with replace_files(path) as (temporary,):
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        problem = f"cannot write the file: {error.strerror or error}"
        raise EdgetuneError(problem, got=str(path), action="free some disk space, or choose another folder") from error


def check_writable(path: Path) -> None:
    """Raise where no file can be written into a folder, or no such folder be made, as far as can be seen before."""
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "nothing can be written into it" if there.is_dir() else "it is a file, not a folder"
        raise EdgetuneError(reason, where=str(there), action="choose another folder")


def flush(path: Path) -> None:
    """Make the disk hold what was written to a file or a folder."""
    if os.name != "posix" and path.is_dir():  # Windows opens no folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
