"""Run a recipe, or continue a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.core.errors import EdgetuneError
from edgetune.core.ledger import Ledger, Verdict
from edgetune.core.progress import Progress
from edgetune.recipe.recipe import Recipe, load
from edgetune.run import reuse, runs
from edgetune.run.fold import Fold


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    ledger: Ledger

    @property
    def program(self) -> Path | None:
        """The `.pte`, if the recipe exports."""
        return self.folder / self.ledger.program.path if self.ledger.program else None

    @property
    def report(self) -> Path:
        """The HTML page."""
        return self.folder / "report.html"

    @property
    def missed(self) -> tuple[Verdict, ...]:
        """The budget limits that are not met."""
        return tuple(v for v in self.ledger.verdicts if not v.holds)


def run(
    recipe: str | Path | Recipe,
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    from_step: str | int | None = None,
    until_step: str | int | None = None,
    progress: Progress | None = None,
) -> Run:
    """Run a recipe: by name, by path, or a `Recipe`.

    Args:
        recipe: the name of a packaged recipe, a path that ends in `.yaml`, or a `Recipe`.
        overrides: `{"train.epochs": 2}`, as on the command line; not allowed with a `Recipe`, which is already
            resolved.
        out: folder of the run; by default the next `runs/<recipe>-NNN`.
        resume: continue the run in `out`, or the newest run of this recipe. If its settings differ, everything
            before the first changed step is reused.
        from_step: resume, and repeat this step (its number, its name if it is unique, or "export") and all later
            steps, even if nothing changed.
        until_step: stop after this step; `resume` continues from there.
        progress: called with (what, done, of, detail).

    Raises:
        EdgetuneError: any error that stops the run, with its kind in `exit_code`. A budget that is not met does not
            raise: it is listed in `Run.missed`.
    """
    if isinstance(recipe, Recipe):
        if overrides:
            raise EdgetuneError("a Recipe value takes no overrides", action="pass them to edgetune.recipe.recipe.load")
    else:
        recipe = load(recipe, overrides)
    where = None if out is None else Path(out)
    again_from = None if from_step is None else reuse.step_number(recipe, from_step, export=True)
    until = None if until_step is None else reuse.step_number(recipe, until_step)
    if again_from and until and again_from > until:
        raise EdgetuneError("--until names an earlier step than --from", got=(from_step, until_step))
    steps = None
    if resume or again_from:
        folder, steps = runs.resumable_folder(recipe, where, again_from)
    else:
        folder = runs.new_folder(recipe, where)
    with runs.lock_run(folder):
        fold = Fold(recipe, folder, resume=steps is not None, progress=progress or (lambda *_: None))
        fold.rehearse()
        if steps is not None:  # not before the recipe as it is now has been seen to work
            runs.roll_back(recipe, folder, steps)
            fold.reuse(steps)
        try:
            return Run(folder, fold.run(until))
        except EdgetuneError as error:
            if fold.ledger.trainings:
                again = f"change the recipe, then: edgetune run RECIPE --resume --out {folder}"
                error.action = "; ".join(filter(None, [error.action, f"what was trained is not lost: {again}"]))
            raise
