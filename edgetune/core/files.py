"""Write files and folders completely or not at all."""

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
    """Yield a temporary path next to each path, to write to; at the end the files are flushed and renamed.

    Readers see an old file or a complete new one, and the last path only after those before it. If the block raises,
    the temporary files are removed and the old ones stay. Suffixes are kept.
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
    """Yield a temporary folder to fill, which becomes `path` at the end; if the block raises, it is removed."""
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
    """Write a text by `replace_files`. Raises `EdgetuneError` if the file cannot be written."""
    try:
        with replace_files(path) as (temporary,):
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        problem = f"cannot write the file: {error.strerror or error}"
        raise EdgetuneError(problem, got=str(path), action="free some disk space, or choose another folder") from error


def check_writable(path: Path) -> None:
    """Raise if nothing can be written into a folder, or the folder cannot be created, as far as can be checked."""
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "nothing can be written into it" if there.is_dir() else "it is a file, not a folder"
        raise EdgetuneError(reason, where=str(there), action="choose another folder")


def flush(path: Path) -> None:
    """Flush a file or folder to the disk."""
    if os.name != "posix" and path.is_dir():  # Windows opens no folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
