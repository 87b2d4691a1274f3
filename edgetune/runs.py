"""The folder of a run: numbered, holding what is needed to resume it, every file written whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

from edgetune.environment import versions
from edgetune.files import write_whole
from edgetune.ledger import Ledger
from edgetune.technique import EdgetuneError, Exit

if TYPE_CHECKING:
    from edgetune.data.dataset import Dataset
    from edgetune.recipe import Recipe


RUNS = Path("runs")  # under the working folder
# all that a start which was killed leaves
_BEGUN = re.compile(r"\.?(recipe\.yaml|environment\.json|digest\.txt|run\.lock)(\..*)?")


def new_folder(recipe: Recipe, out: Path | None) -> Path:
    """A fresh folder: `out`, or the next number under runs/. An `out` that holds anything is refused."""
    folder = _numbered(recipe.name) if out is None else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "digest.txt").exists() or not all(_BEGUN.fullmatch(path.name) for path in folder.iterdir()):
            action = "pass --resume to go on with it, or choose another folder"
            raise EdgetuneError("the run's folder is not empty", got=str(folder), action=action)
    except OSError as error:
        raise EdgetuneError(f"cannot make the run's folder: {error.strerror}", got=str(folder)) from error
    write_whole(folder / "recipe.yaml", recipe.to_yaml())
    write_whole(folder / "environment.json", json.dumps(versions(), indent=1))
    write_whole(folder / "digest.txt", recipe.digest)  # last: a folder without it cannot be resumed
    return folder


def _numbered(name: str) -> Path:
    """The next free number; made here, so that two runs at once do not take the same."""
    number = 1 + max((_number(f, name) for f in RUNS.glob(f"{name}-*")), default=0)
    while True:
        try:
            (RUNS / f"{name}-{number:03d}").mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return RUNS / f"{name}-{number:03d}"


def _number(folder: Path, name: str) -> int:
    rest = folder.name[len(name) + 1 :]
    return int(rest) if rest.isdecimal() else 0


def resumable_folder(recipe: Recipe, out: Path | None) -> Path:
    """`out`, or the newest unfinished run of this very recipe. Refused if its settings differ or it is finished."""
    numbered = [f for f in RUNS.glob(f"{recipe.name}-*") if _number(f, recipe.name)]
    found = [out] if out else sorted(numbered, key=lambda f: _number(f, recipe.name))
    found = [f for f in found if (f / "digest.txt").exists()]
    if not found:
        raise EdgetuneError("there is no run to resume", got=str(out or RUNS), action="run without --resume")
    folder = next((f for f in reversed(found) if _can_go_on(f, recipe)), found[-1])
    if (folder / "digest.txt").read_text(encoding="utf-8") != recipe.digest:
        raise EdgetuneError(
            "the run was made with other settings",
            got=str(folder),
            action=f"give the settings of {folder / 'recipe.yaml'}, or run without --resume",
        )
    earlier = earlier_ledger(folder)
    if earlier is not None and earlier.finished:
        raise EdgetuneError("the run is finished", got=str(folder), action=f"edgetune report {folder}")
    return folder


def _can_go_on(folder: Path, recipe: Recipe) -> bool:
    earlier = earlier_ledger(folder)
    same = (folder / "digest.txt").read_text(encoding="utf-8") == recipe.digest
    return same and (earlier is None or not earlier.finished)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps a second process out of the folder; the system lets go if this one dies."""
    lock = filelock.FileLock(folder / "run.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        action = "wait for it, or choose another folder"
        raise EdgetuneError("another process is at work on this run", got=str(folder), action=action) from error
    try:
        for left in folder.glob(".*.json.*"):  # a kill in the middle of a write
            left.unlink()
        yield
    finally:
        lock.release()


def same_data(folder: Path, dataset: Dataset) -> None:
    """Note what rows a run began with; raise where a resumed run finds others."""
    path = folder / "data.txt"
    if not path.exists():
        write_whole(path, dataset.fingerprint)
    elif path.read_text(encoding="utf-8") != dataset.fingerprint:
        raise EdgetuneError(
            "the data changed since the run began",
            got=dataset.name,
            action="put the data back, or run without --resume",
            exit_code=Exit.DATA,
        )


def earlier_ledger(folder: Path) -> Ledger | None:
    """What an interrupted run had measured; `None` when it had not come that far."""
    path = folder / "ledger.json"
    return Ledger.read(path) if path.exists() else None
