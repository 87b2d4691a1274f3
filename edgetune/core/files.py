"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from edgetune.core.errors import EdgetuneError


def write_whole(path: Path, text: str) -> None:
    """Write under a temporary name beside `path`, flush to disk, rename: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            what = f"cannot write the file: {error.strerror or error}"
            raise EdgetuneError(what, got=str(path), action="free some disk space, or choose another folder") from error
        raise


def check_folder(path: Path) -> None:
    """Raise where no file can be written into a folder, or no such folder be made, as far as can be seen before."""
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "nothing can be written into it" if there.is_dir() else "it is a file, not a folder"
        raise EdgetuneError(reason, where=str(there), action="choose another folder")


def flush(path: Path) -> None:
    """Make the disk hold what was written to a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
