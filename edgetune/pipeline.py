"""A recipe, run: a fold over the steps, with a row in the ledger after each; then export, proof and profile."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from edgetune import registry, runs
from edgetune.attach import apply, closes, finalize, opened
from edgetune.budget import verdicts
from edgetune.data import task as tasks
from edgetune.data.baselines import baselines
from edgetune.data.dataset import Dataset, Split
from edgetune.environment import versions
from edgetune.export.targets import find
from edgetune.exporting import Exportable, check_talks, of_split, tell_run, to_program
from edgetune.files import write_whole
from edgetune.ledger import Ledger, Measured, Predicted, Quality, Row, Training, Verdict
from edgetune.measures import MIB, kept_mib, measure
from edgetune.models.carrying import carried
from edgetune.models.loaded import Loaded
from edgetune.outline import in_words
from edgetune.profile.device import load as load_device
from edgetune.quant.size import stored_bytes
from edgetune.recipe import ExportSettings, ProfileSettings, Recipe, Step, load
from edgetune.technique import EdgetuneError, Inputs, Sample, Settings, Technique
from edgetune.train import Train, seed_everything, train

if TYPE_CHECKING:
    from edgetune.export.artifact import Artifact
    from edgetune.export.language.artifact import LanguageArtifact

Progress = Callable[[str, int, int, str], None]  # what is being done, how far, of how much, a detail to show

CALIBRATION_ROWS = 16  # of the training set, in each of the batches a technique may look at
CALIBRATION_BATCHES = 8
EVALUATION_BATCH = 64


class Eval(Settings):
    """A step that changes nothing: its row in the ledger is the point."""

    name: ClassVar[str] = "eval"


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
        """The page to look at."""
        return self.folder / "report.html"

    @property
    def missed(self) -> tuple[Verdict, ...]:
        """The lines of the budget that do not hold."""
        return tuple(v for v in self.ledger.verdicts if not v.holds)


def run(
    recipe: str | Path | Recipe,
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Run a recipe: by name, by path, or a `Recipe`.

    Args:
        recipe: a name in the package, a path that ends in `.yaml`, or the value itself.
        overrides: `{"train.epochs": 2}`, as on the command line; not with a `Recipe`, which is resolved already.
        out: the run's folder; by default the next `runs/<recipe>-NNN`.
        resume: go on with the run in `out`, or with the newest run of this recipe.
        progress: called with (what, done, of, detail).

    Raises:
        EdgetuneError: anything that stops the run; `exit_code` says of what kind. Budgets that do not hold do not
            raise: they stand in `Run.missed`.
    """
    if isinstance(recipe, Recipe):
        if overrides:
            raise EdgetuneError("a Recipe value takes no overrides", action="pass them to edgetune.recipe.load")
    else:
        recipe = load(recipe, overrides)
    where = None if out is None else Path(out)
    folder = runs.resumable_folder(recipe, where) if resume else runs.new_folder(recipe, where)
    with runs.alone(folder):
        return Run(folder, Fold(recipe, folder, resume, progress or (lambda *_: None)).run())


def restore(folder: str | Path, language: bool = False) -> Exportable:
    """The model a finished run ended with: its steps again, with the trained weights from its checkpoints.

    `language`: its program is to talk, whether or not the recipe says so.
    """
    folder = Path(folder)
    earlier = runs.earlier_ledger(folder)
    if earlier is None or not earlier.finished:
        raise EdgetuneError(
            "the folder holds no finished run", got=str(folder), action=f"edgetune run RECIPE --resume --out {folder}"
        )
    recipe = load(folder / "recipe.yaml")
    fold = Fold(recipe, folder, resume=True, progress=lambda *_: None, record=False)
    fold.steps()
    return replace(fold.exportable(language), ledger=earlier)


class Fold:
    """The state that the steps are folded over: the model, and the ledger so far."""

    def __init__(self, recipe: Recipe, folder: Path, resume: bool, progress: Progress, record: bool = True) -> None:
        self.recipe, self.folder, self.resume, self.progress, self.record = recipe, folder, resume, progress, record
        earlier = runs.earlier_ledger(folder) if resume else None
        self.known = {row.index: row for row in earlier.rows} if earlier else {}
        if record:
            _check_reachable(recipe)
        started = time.perf_counter()
        progress("load", 0, 2, recipe.data.source)
        self.dataset: Dataset = registry.loader(registry.DATASETS, "data", recipe.data.source)(recipe.data)
        if record:
            runs.same_data(folder, self.dataset)
        progress("load", 1, 2, recipe.model.source)
        seed_everything(recipe.seed)
        loaded: Loaded = registry.loader(registry.MODELS, "model", recipe.model.source)(recipe.model, self.dataset)
        progress("load", 2, 2, loaded.name)
        self.dataset = loaded.labelled(self.dataset)  # a trained head that was kept has its own order of classes
        self.model: nn.Module = loaded.model
        self.task = self.dataset.task
        self.train_split = Split(self.task, self.dataset.train, loaded.encode)
        self.validation_split = Split(self.task, self.dataset.validation, loaded.encode)
        self.test_split = Split(self.task, self.dataset.test, loaded.encode)
        self.load_seconds = time.perf_counter() - started
        self.carried = carried(loaded, self.dataset, recipe.name)
        self.batch_size = next((s.settings.batch_size for s in recipe.steps if isinstance(s.settings, Train)), 32)
        self.teachers: dict[str, nn.Module] = {}
        self.least_training_mib: list[float] = []
        self.ledger = Ledger(
            recipe=recipe.name,
            seed=recipe.seed,
            model=loaded.name,
            data=self.dataset.name,
            settings=recipe.resolved(),
            environment=versions(),
            baselines=earlier.baselines if earlier else baselines(self.dataset, loaded.encode),
            notes=(*self.dataset.notes, *loaded.notes),
        )
        if recipe.export and recipe.export.check_rows > len(self.test_split):
            raise EdgetuneError(
                "export.check_rows asks for more rows than the test set has",
                got=recipe.export.check_rows,
                action=f"ask for at most {len(self.test_split)}",
            )
        if recipe.export and recipe.export.language and record:
            check_talks(self.model, self.task, loaded.encode, recipe.export)

    def run(self) -> Ledger:
        """Steps, export, profile, verdicts."""
        self.steps()
        if self.recipe.export:
            self.export()
        self.ledger = self.ledger.with_(
            verdicts=verdicts(self.recipe.budget, self.ledger, self.least_training_mib), finished=True
        )
        self.save()
        return self.ledger

    def steps(self) -> None:
        """All steps, and what is open at the end finalized."""
        self.add_row("load", self.recipe.model.source, self.load_seconds)
        taught = {s.settings.distill.teacher for s in self.recipe.steps if _distils(s)}  # type: ignore[attr-defined]
        for index, step in enumerate(self.recipe.steps):
            seed_everything(self.recipe.seed + 1000 * (index + 1))  # so that a resumed run replays the same step
            if step.name in taught and step.name not in self.teachers:
                self.close_for(step)
                self.teachers[step.name] = copy.deepcopy(self.model).eval().requires_grad_(False)
            try:
                self.step(index, step)
            except EdgetuneError as error:
                where = f"{self.recipe.name}, step {index + 1}"  # a technique's error names it already
                error.within(where if isinstance(step.settings, Technique) else f"{where}, {step.name}")
                raise
        self.close()
        self.model.eval()

    def step(self, index: int, step: Step) -> None:
        """One step of the recipe."""
        self.close_for(step)
        started = time.perf_counter()
        if isinstance(step.settings, Technique):
            self.progress(step.name, 0, 1, in_words(step.settings))
            self.model = apply(self.model, step.settings, self.sample())
            self.progress(step.name, 1, 1, "")
            seconds = time.perf_counter() - started
            self.add_row(step.name, in_words(step.settings), seconds, exact=step.settings.exact)
        elif isinstance(step.settings, Train):
            self.train(index, step.settings)
        elif step.name == "finalize":
            self.close()
        else:
            self.add_row(step.name, "", 0.0)

    def close_for(self, step: Step) -> None:
        """Finalize what is open before a step that needs plain layers, or that is open already."""
        if closes(step.settings, [technique.name for technique in opened(self.model)]):
            self.close()

    def close(self) -> None:
        """Finalize what is open, as a row of its own; keep what can be kept apart, such as an adapter."""
        techniques = [t for t in opened(self.model) if t.opens]
        if not techniques:
            self.model = finalize(self.model)
            return
        started = time.perf_counter()
        if self.record:
            for technique in techniques:
                technique.save(self.model, self.folder)
        names = ", ".join(t.name for t in reversed(techniques))
        self.model = finalize(self.model)
        self.add_row("finalize", names, time.perf_counter() - started)

    def train(self, index: int, settings: Train) -> None:
        """A `train` step, with what its memory comes to."""
        started = time.perf_counter()
        teacher = self.teachers.get(settings.distill.teacher) if settings.distill else None
        name = f"{index + 1:02d}-train"
        kept = kept_mib(self.model, self.largest_batch(settings.batch_size), self.loss)
        one = kept_mib(self.model, self.largest_batch(1), self.loss)
        result = train(
            self.model,
            settings,
            self.train_split,
            self.loss,
            seed=self.recipe.seed + index,
            folder=self.folder / "checkpoints" / name,
            resume=self.resume,
            teacher=teacher,
            validation=lambda model: tasks.quality(self.task, model, self.validation_split, EVALUATION_BATCH),
            progress=lambda done, of, loss, _: self.progress(f"{index + 1} train", done, of, f"loss {loss:.3f}"),
        )
        row = self.add_row("train", in_words(settings), time.perf_counter() - started)
        taught_by = stored_bytes(teacher) / MIB if teacher is not None else 0.0
        fixed = row.size_mib + result.gradients_mib + result.optimizer_state_mib + taught_by
        self.least_training_mib.append(fixed + one)
        training = Training(
            row=row.index,
            losses=result.losses,
            optimizer_state_mib=result.optimizer_state_mib,
            gradients_mib=result.gradients_mib,
            peak_memory_mib=fixed + kept,
        )
        self.ledger = self.ledger.with_(trainings=(*self.ledger.trainings, training))
        self.save()

    def export(self) -> None:
        """The program, measured here and predicted for the devices."""
        assert self.recipe.export is not None
        self.progress("export", 0, 1, self.recipe.export.target)
        artifact = to_program(self.exportable(), self.folder / "model.pte", target=self.recipe.export.target)
        self.progress("export", 1, 1, "")
        self.ledger = self.ledger.with_(program=artifact.program().model_copy(update={"path": artifact.path.name}))
        self.save()
        if self.recipe.profile is not None:
            self.profile(artifact, self.recipe.profile, find(self.recipe.export.target).runs_here)
        tell_run(artifact, self.ledger)

    def profile(self, artifact: Artifact | LanguageArtifact, asked: ProfileSettings, runs_here: bool) -> None:
        """Every kind of call of the program, timed on this host and predicted for each device."""
        from edgetune.profile.calls import measured_calls, predicted_calls
        from edgetune.profile.device import HOST, ids

        devices = [*asked.devices]
        measured: tuple[Measured, ...] = ()
        if asked.measure and runs_here:
            self.progress("profile", 0, len(devices) + 1, "this host")
            measured = measured_calls(artifact)
            devices += [HOST] if HOST in ids() and HOST not in devices else []  # predicted beside measured
        predicted: list[Predicted] = []
        for number, device in enumerate(devices):
            self.progress("profile", number + 1, len(devices) + 1, device)
            predicted += predicted_calls(artifact, device)
        self.progress("profile", 1, 1, "")
        self.ledger = self.ledger.with_(measured=measured, predicted=tuple(predicted))

    def exportable(self, language: bool = False) -> Exportable:
        """The model as it stands, and what its program is made of, compared on and has beside it."""
        asked = self.recipe.export or ExportSettings(check_rows=min(EVALUATION_BATCH, len(self.test_split)))
        return of_split(self.model, self.test_split, self.recipe.model.max_length, asked, self.carried, language)

    def largest_batch(self, rows: int) -> tuple[Inputs, torch.Tensor]:
        """The training rows with the most tokens: what the memory of a training has to hold."""
        lengths = self.train_split.lengths or (0,) * len(self.train_split)
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        return self.train_split.batch(order[:rows])

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The task's loss."""
        return tasks.loss(self.task, logits, labels)

    def one_row(self, index: int) -> Inputs:
        """One row of the test set, in the shape the program takes."""
        return self.test_split.one_row(index, self.recipe.model.max_length)

    def example(self) -> Inputs:
        """The first row of the test set."""
        return self.one_row(0)

    def sample(self) -> Sample:
        """What techniques may look at: rows of the training set only."""
        example = self.train_split.one_row(0, self.recipe.model.max_length)
        pad_to = None if self.task == "image-classification" else self.recipe.model.max_length

        def batches() -> Iterator[Inputs]:
            rows = min(CALIBRATION_ROWS * CALIBRATION_BATCHES, len(self.train_split))
            for start in range(0, rows, CALIBRATION_ROWS):
                chosen = range(start, min(start + CALIBRATION_ROWS, rows))
                yield self.train_split.batch(chosen, pad_to=pad_to)[0]

        def labelled() -> Iterator[tuple[Inputs, torch.Tensor]]:
            yield self.largest_batch(self.batch_size)
            rows = min(self.batch_size * CALIBRATION_BATCHES, len(self.train_split))
            for start in range(0, rows, self.batch_size):
                yield self.train_split.batch(range(start, min(start + self.batch_size, rows)))

        return Sample(inputs=example, batches=batches, labelled=labelled, loss=self.loss)

    def add_row(self, step: str, detail: str, seconds: float, exact: bool = False) -> Row:
        """Measure the model as it stands; a resumed run takes the row it had already measured.

        After an `exact` step, whose outputs are the same by law, quality is the last row's, and the row says so.
        """
        index = len(self.ledger.rows)
        row = self.known.get(index)
        if row is None or row.step != step:
            self.progress("measure", 0, 1, f"after {step}")
            found = measure(self.model, self.example(), self.largest_batch(self.batch_size), self.loss)
            quality = self.ledger.rows[-1].quality if exact else self.quality()
            note = "quality as before: the step changes no output" if exact else ""
            row = Row(
                index=index, step=step, detail=detail, quality=quality, seconds=seconds, note=note, **found._asdict()
            )
            self.progress("measure", 1, 1, f"{quality.metric} {quality.value:.2f}" if quality else "")
        self.ledger = self.ledger.with_(rows=(*self.ledger.rows, row))
        self.save()
        return row

    def quality(self) -> Quality:
        """Of the model as it stands, on the test set."""
        return self.quality_of(self.model)

    def quality_of(self, model: nn.Module) -> Quality:
        """Of any model, on the test set."""
        return tasks.quality(self.task, model, self.test_split, EVALUATION_BATCH)

    def save(self) -> None:
        """Write the ledger, and when finished the report."""
        from edgetune.report import write

        if not self.record:
            return
        if self.ledger.finished:
            write(self.ledger, self.folder)
        else:
            write_whole(self.folder / "ledger.json", self.ledger.dumps())


def _check_reachable(recipe: Recipe) -> None:
    """What is only needed at the end, checked before any work: the report's library, the target, the devices."""
    registry.require("plotly", "the report")
    if recipe.export:
        registry.require("executorch", "export")
        find(recipe.export.target).partitioners()
    for name in recipe.profile.devices if recipe.profile else ():
        load_device(name)


def _distils(step: Step) -> bool:
    return isinstance(step.settings, Train) and step.settings.distill is not None
