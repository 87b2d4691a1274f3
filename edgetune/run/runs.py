"""The folder of a run: numbered, with everything needed to resume it, and every file written atomically."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.files import write_atomically
from edgetune.core.ledger import Ledger
from edgetune.run import reuse
from edgetune.run.environment import installed_versions

if TYPE_CHECKING:
    from edgetune.data.dataset import Dataset
    from edgetune.recipe.recipe import Recipe


RUNS = Path("runs")  # under the working folder
# all that a start which was killed leaves
_BEGUN = re.compile(r"\.?(recipe\.yaml|environment\.json|digest\.txt|run\.lock)(\..*)?")


def new_folder(recipe: Recipe, out: Path | None) -> Path:
    """A new folder: `out`, or the next number under runs/. An `out` that is not empty is refused."""
    folder = _numbered(recipe.name) if out is None else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "digest.txt").exists() or not all(_BEGUN.fullmatch(path.name) for path in folder.iterdir()):
            action = "pass --resume to continue it, or choose another folder"
            raise EdgetuneError("the run's folder is not empty", got=str(folder), action=action)
    except OSError as error:
        raise EdgetuneError(f"cannot create the folder of the run: {error.strerror}", got=str(folder)) from error
    _describe(recipe, folder)
    return folder


def _describe(recipe: Recipe, folder: Path) -> None:
    write_atomically(folder / "recipe.yaml", recipe.to_yaml())
    write_atomically(folder / "environment.json", json.dumps(installed_versions(), indent=1))
    write_atomically(folder / reuse.FILE, reuse.digest_text(recipe))  # last: a folder without it cannot be resumed


def _numbered(name: str) -> Path:
    """The next free number; created here, so that two runs at once do not take the same."""
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


def resumable_folder(recipe: Recipe, out: Path | None, again_from: int | None = None) -> tuple[Path, int]:
    """`out`, or the run of this recipe to continue, and how many of its steps, from the first, are reused.

    The newest unfinished run with exactly these settings; else the newest with this model and data, of which the steps
    before the first change are reused. Steps from `again_from` on are repeated in any case.
    Raises `EdgetuneError` if there is no such run, or nothing is left to do.
    """
    numbered = [f for f in RUNS.glob(f"{recipe.name}-*") if _number(f, recipe.name)]
    folders = [out] if out else sorted(numbered, key=lambda f: _number(f, recipe.name), reverse=True)
    folders = [f for f in folders if (f / reuse.FILE).exists()]
    if not folders:
        raise EdgetuneError("there is no run to resume", got=str(out or RUNS), action="run without --resume")
    unchanged = {f: reuse.unchanged_steps(recipe, f) for f in folders}
    usable = [f for f, steps in unchanged.items() if steps is not None]
    if not usable:
        raise EdgetuneError(
            "nothing of this run can be reused: its model, data or seed is different",
            got=str(folders[0]),
            action=f"give the settings of {folders[0] / 'recipe.yaml'}, or run without --resume",
        )
    folder = next((f for f in usable if _can_continue(f, recipe)), usable[0])
    steps = unchanged[folder] or 0
    earlier = read_ledger(folder)
    if again_from is None and reuse.is_run_of(recipe, folder) and earlier and earlier.finished:
        action = f"edgetune report {folder}, or repeat part of it with --from STEP"
        raise EdgetuneError("the run is finished", got=str(folder), action=action)
    return folder, steps if again_from is None else min(steps, again_from - 1)


def _can_continue(folder: Path, recipe: Recipe) -> bool:
    earlier = read_ledger(folder)
    return reuse.is_run_of(recipe, folder) and (earlier is None or not earlier.finished)


def roll_back(recipe: Recipe, folder: Path, steps: int) -> None:
    """Keep in the folder only what the first `steps` steps produced, and make it a run of this recipe.

    Call it within `lock_run`. A kill in between loses only work that would be repeated anyway.
    """
    chain = reuse.step_digests(recipe)
    earlier = read_ledger(folder)
    if earlier is not None:
        rows = tuple(row for row in earlier.rows if row.digest in reuse.reusable_digests(chain, steps))
        kept = {row.index for row in rows}
        trainings = tuple(t for t in earlier.trainings if t.row in kept)
        nothing = {"program": None, "measured": (), "predicted": (), "verdicts": (), "finished": False}
        ledger = earlier.with_(rows=rows, trainings=trainings, settings=recipe.resolve(), **nothing)
        write_atomically(folder / "ledger.json", ledger.dumps())
    shutil.rmtree(folder / "finished", ignore_errors=True)
    for checkpoints in (folder / "checkpoints").glob("[0-9]*-train"):
        if int(checkpoints.name.partition("-")[0]) > steps:
            shutil.rmtree(checkpoints)
    _describe(recipe, folder)


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Keep a second process out of the folder; the system releases the lock if this one dies."""
    lock = filelock.FileLock(folder / "run.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        action = "wait for it, or choose another folder"
        raise EdgetuneError("another process is using this run", got=str(folder), action=action) from error
    try:
        for left in folder.glob(".*.json.*"):  # a kill in the middle of a write
            left.unlink()
        yield
    finally:
        lock.release()


def check_same_data(folder: Path, dataset: Dataset) -> None:
    """Record the data of a new run; raise if a resumed run has other data."""
    path = folder / "data.txt"
    if not path.exists():
        write_atomically(path, dataset.fingerprint)
    elif path.read_text(encoding="utf-8") != dataset.fingerprint:
        raise EdgetuneError(
            "the data has changed after the run started",
            got=dataset.name,
            action="restore the data, or run without --resume",
            exit_code=Exit.DATA,
        )


def read_ledger(folder: Path) -> Ledger | None:
    """The ledger of an interrupted run; `None` if it had not measured anything yet."""
    path = folder / "ledger.json"
    return Ledger.read(path) if path.exists() else None
