"""The fold over a recipe's steps: the model, with a ledger row after each; then export, verification and profile."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from edgetune.core import registry
from edgetune.core.apply import active_techniques, apply, finalize
from edgetune.core.errors import EdgetuneError
from edgetune.core.files import write_atomically
from edgetune.core.inputs import tensors_of
from edgetune.core.ledger import Ledger, Quality, Row, Shift, Training
from edgetune.core.numbers import MIB
from edgetune.core.numbers import format_quality as quality_in_words
from edgetune.core.order import plan_steps
from edgetune.core.progress import NOTE, Progress
from edgetune.core.technique import Sample, StepSettings, Technique
from edgetune.core.traits import Trait
from edgetune.core.widths import BitWidths
from edgetune.data.dataset import Dataset, Split
from edgetune.export.targets import find
from edgetune.models.chat import drop_truncated_answers
from edgetune.models.loaded import LoadedModel
from edgetune.models.metadata import describe_io
from edgetune.program.card import write_card
from edgetune.quant.size import stored_bytes
from edgetune.recipe.outline import describe_settings
from edgetune.recipe.recipe import Recipe
from edgetune.recipe.sections import Step
from edgetune.run import reuse, runs
from edgetune.run.budget import check_budgets
from edgetune.run.environment import installed_versions
from edgetune.run.exportable import check_adapters, check_can_generate, exportable_from_split, to_program
from edgetune.run.finished import save_finished
from edgetune.run.layer_times import layers_ms_of
from edgetune.run.loading import has_guard, load_model, task_to_load
from edgetune.run.measures import join_notes, measure, saved_mib
from edgetune.run.profiling import profile_program
from edgetune.run.rehearsal import check_reachable, name_step_in_errors, rehearse
from edgetune.run.samples import CALIBRATION_BATCHES, Samples, few_rows_note
from edgetune.tasks.quality import answers_on, distributions_on, quality, shift_between
from edgetune.train.loggers import TrainingLog
from edgetune.train.loop import seed_everything, train
from edgetune.train.settings import Train

EVALUATION_BATCH = 64


class Eval(StepSettings):
    """Measure the model and add a row to the report. The model does not change."""

    name: ClassVar[str] = "eval"


class Fold:
    """The state of the fold: the model, and the ledger so far."""

    def __init__(self, recipe: Recipe, folder: Path, resume: bool, progress: Progress, record: bool = True) -> None:
        self.recipe, self.folder, self.resume, self.progress, self.record = recipe, folder, resume, progress, record
        earlier = runs.read_ledger(folder) if resume else None
        self.measured_before = {row.digest: row for row in earlier.rows} if earlier else {}
        self.digests = reuse.step_digests(recipe)
        self.digest = self.digests[0]  # of what was done to the model so far
        if record:
            check_reachable(recipe)
        started = time.perf_counter()
        progress("load", 0, 2, recipe.data.source)
        self.dataset: Dataset = registry.loader(registry.DATASETS, "data", recipe.data.source)(recipe.data)
        if record:
            runs.check_same_data(folder, self.dataset)
        progress("load", 1, 2, recipe.model.source)
        loaded = load_model(recipe, self.dataset)
        progress("load", 2, 2, loaded.name)
        self.data_as_read = self.dataset
        self.dataset = loaded.relabel(self.dataset)  # a trained head that was kept has its own order of classes
        self.dataset = drop_truncated_answers(self.dataset, loaded.encode, loaded.name, recipe.data.max_bad_rows_pct)
        self.model: nn.Module = loaded.model
        self.task = self.dataset.task
        self.train_split = Split(self.task, self.dataset.train, loaded.encode)
        self.validation_split = Split(self.task, self.dataset.validation, loaded.encode)
        self.test_split = Split(self.task, self.dataset.test, loaded.encode)
        self.load_seconds = time.perf_counter() - started
        self.carried = describe_io(loaded, self.dataset, recipe.name)
        batch_sizes = [step.settings.batch_size for step in recipe.steps if isinstance(step.settings, Train)]
        batch_size = next(iter(batch_sizes), 32)
        self.samples = Samples(self.train_split, self.test_split, recipe.model.max_length, batch_size)
        self.teachers: dict[str, nn.Module] = {}
        self.least_training_mib: list[float] = []
        self.float_model: nn.Module | None = None  # before it was quantized
        self.ledger = Ledger(
            recipe=recipe.name,
            seed=recipe.seed,
            model=loaded.name,
            data=self.dataset.name,
            settings=recipe.resolve(),
            environment=installed_versions(),
            baselines=earlier.baselines if earlier else self.task.baselines(self.dataset.parts, loaded.encode),
            notes=(*self.dataset.notes, *loaded.notes),
        )
        if record:
            for note in (*self.ledger.notes, *few_rows_note(self.dataset)):  # not only in the report
                progress(NOTE, 0, 0, note)
            self.check(loaded, batch_sizes)

    def check(self, loaded: LoadedModel, batch_sizes: list[int]) -> None:
        """Check later steps against model and data, before any work is done."""
        asked = self.recipe.export
        if not self.task.texts:
            from edgetune.models.vision import check_image_size

            example = tensors_of(self.samples.example())[0]
            check_image_size(loaded.name, self.model, example, self.samples.least_batch(batch_sizes))
        if self.recipe.data.augment and self.task.texts:
            raise EdgetuneError("data.augment only applies to images", got=self.task.name, action="leave it out")
        trainings = [step.settings for step in self.recipe.steps if isinstance(step.settings, Train)]
        if self.recipe.data.augment and any(training.cache_prefix for training in trainings):
            raise EdgetuneError(
                "cache_prefix stores the outputs for each image, but data.augment changes the image each time",
                action="leave out one of the two",
            )
        if any(training.class_weights != "none" for training in trainings):
            self.task.class_weights(self.dataset.train)
        if asked and asked.rows_to_check(len(self.test_split)) > len(self.test_split):
            raise EdgetuneError(
                "export.check_rows exceeds the number of test rows",
                got=asked.check_rows,
                action=f"use at most {len(self.test_split)}",
            )
        if asked:
            check_adapters(asked)
        if asked and asked.language:
            whole = [step.name for step in self.recipe.steps if not getattr(step.settings, "continues", True)]
            if whole:
                message = "the model takes a whole text after these steps, and a text-generation program continues one"
                raise EdgetuneError(message, got=whole, action="leave out export.language, or these steps")
            task = task_to_load(self.recipe, self.data_as_read.task)
            check_can_generate(self.model, task, loaded.encode, asked)

    def run(self, until: int | None = None) -> Ledger:
        """Run the steps, export, profile and budgets; or only the steps up to `until`."""
        self.steps(until)
        if until is not None:
            return self.ledger
        save_finished(self.folder, self.model, self.recipe, self.data_as_read, self.samples.example())
        self.ledger = self.ledger.with_(answers=answers_on(self.model, self.test_split, EVALUATION_BATCH))
        if self.recipe.export:
            self.export()
        self.ledger = self.ledger.with_(
            verdicts=check_budgets(self.recipe.budget, self.ledger, self.least_training_mib), finished=True
        )
        self.save()
        return self.ledger

    def rehearse(self) -> None:
        """Run all steps on an untrained copy, if anything is trained, so that a late step fails before the training."""
        needed = rehearse(self.recipe, self.model, self.sample(), self.samples.example(), self.progress)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise EdgetuneError(
                f"the run will write at least {needed / MIB:,.0f} MiB, and the disk has less",
                where=str(self.folder),
                got=f"{free / MIB:,.0f} MiB free",
                action="free some disk space, or choose another disk with --out",
            )

    def reuse(self, steps: int) -> None:
        """Reuse the rows that an earlier run measured up to this step, and report so."""
        standing = reuse.reusable_digests(self.digests, steps)
        self.measured_before = {d: row for d, row in self.measured_before.items() if d in standing}
        names = [row.step for row in self.measured_before.values()]
        if names:
            self.progress("reuse", len(names), len(names), f"{', '.join(names)} of {self.folder}")

    def steps(self, until: int | None = None) -> None:
        """Run all steps, and finalize at the end; or run the steps up to `until`, without finalizing."""
        if not has_guard(self.recipe):  # as loaded, the model does not do the task of the data yet
            self.add_row("load", self.recipe.model.source, self.load_seconds)
        steps = self.recipe.steps[:until]
        taught = {s.settings.distill.teacher for s in self.recipe.steps if _distils(s)}  # type: ignore[attr-defined]
        for move in plan_steps([step.settings for step in steps]):
            step = steps[move.index]
            seed_everything(self.recipe.seed + 1000 * (move.index + 1))  # so that a resumed run replays the same step
            with name_step_in_errors(self.recipe, move.index + 1):
                if move.implied:
                    self.close()
                    continue
                if step.name in taught and step.name not in self.teachers:
                    self.teachers[step.name] = copy.deepcopy(self.model).eval().requires_grad_(False)
                self.step(move.index, step)
        if until is None:
            self.close()
        self.model.eval()

    def step(self, index: int, step: Step) -> None:
        """Run one step of the recipe."""
        if step.settings.closes:
            self.close()
        self.digest = self.digests[index + 1]
        if isinstance(step.settings, Technique):
            self.technique(step.settings)
        elif isinstance(step.settings, Train):
            self.train(index, step.settings)
        elif not step.settings.closes:
            self.add_row(step.name, "", 0.0)

    def technique(self, settings: Technique) -> None:
        """Apply a technique. Where it rounds weights, its row says how far that moved the predictions."""
        detail = describe_settings(settings)
        rounds = settings.leaves is Trait.INTEGER
        measures_shift = self.record and rounds and self.digest not in self.measured_before
        before = distributions_on(self.model, self.test_split, EVALUATION_BATCH) if measures_shift else None
        if rounds and self.float_model is None and self.compares_float():
            self.float_model = copy.deepcopy(self.model).eval()
        started = time.perf_counter()
        self.progress(settings.name, 0, 1, detail)
        self.model = apply(self.model, settings, self.sample(settings))
        seconds, note = time.perf_counter() - started, settings.note(self.model)
        self.progress(settings.name, 1, 1, note)
        after = None if before is None else distributions_on(self.model, self.test_split, EVALUATION_BATCH)
        shift = None if before is None or after is None else shift_between(before, after)
        if self.record and not settings.needs_finalize():
            settings.save(self.model, self.folder)
        widths = settings.bit_widths(self.model)
        self.add_row(settings.name, detail, seconds, exact=settings.exact, note=note, shift=shift, widths=widths)

    def close(self) -> None:
        """Finalize what is open, with a row in the ledger; save separate results, such as an adapter."""
        techniques = [t for t in active_techniques(self.model) if t.needs_finalize()]
        if not techniques:
            self.model = finalize(self.model)
            return
        started = time.perf_counter()
        if self.record:
            for technique in techniques:
                technique.save(self.model, self.folder)
        names = ", ".join(t.name for t in reversed(techniques))
        self.model = finalize(self.model)
        self.digest = reuse.finalized_digest(self.digest)
        seconds = time.perf_counter() - started
        self.add_row("finalize", names, seconds, note=join_notes(t.note(self.model) for t in techniques))

    def train(self, index: int, settings: Train) -> None:
        """Run a `train` step, and record its memory."""
        teacher = self.teachers.get(settings.distill.teacher) if settings.distill else None
        name = f"{index + 1:02d}-train"
        saved = saved_mib(self.model, self.samples.largest_batch(settings.batch_size), self.loss)
        one = self.least_saved_mib()
        folder = self.folder / "checkpoints" / name
        with TrainingLog(folder, f"{self.folder.name}-{name}", settings.log, settings.model_dump(mode="json")) as log:

            def progress(done: int, of: int, loss: float, rate: float) -> None:
                log.add(done, of, loss, rate)
                self.progress(f"{index + 1} train", done, of, f"loss {loss:.3f}")

            result = train(
                self.model,
                settings,
                self.augmented_split(),
                self.make_loss(settings.class_weights),
                seed=self.recipe.seed + index,
                folder=folder,
                resume=self.resume,
                teacher=teacher,
                validation=lambda model: quality(model, self.validation_split, EVALUATION_BATCH),
                progress=progress,
            )
        self.add_row("train", describe_settings(settings), result.seconds)
        taught_by = stored_bytes(teacher) / MIB if teacher is not None else 0.0
        fixed = stored_bytes(self.model) / MIB + result.gradients_mib + result.optimizer_state_mib + taught_by
        self.least_training_mib.append(fixed + one)
        training = Training(
            row=len(self.ledger.rows) - 1,
            losses=result.losses,
            optimizer_state_mib=result.optimizer_state_mib,
            gradients_mib=result.gradients_mib,
            peak_memory_mib=fixed + saved,
        )
        self.ledger = self.ledger.with_(trainings=(*self.ledger.trainings, training))
        self.save()

    def augmented_split(self) -> Split:
        """The training rows, with random changes if the data settings ask for them."""
        kinds = self.recipe.data.augment
        if not kinds:
            return self.train_split
        from edgetune.data.augment import Augmented

        return Split(self.task, self.dataset.train, Augmented(self.train_split.encode, kinds))

    def make_loss(self, class_weights: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The task's loss; "balanced" weights every class equally, regardless of its number of rows."""
        if class_weights == "none":
            return self.loss
        weights = self.task.class_weights(self.dataset.train)
        return lambda logits, labels: self.task.loss(logits, labels, weights)

    def least_saved_mib(self) -> float:
        """What a training of one row at a time saves for backward, or of two where a batch norm needs them."""
        try:
            return saved_mib(self.model, self.samples.largest_batch(1), self.loss)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            return saved_mib(self.model, self.samples.largest_batch(2), self.loss)

    def export(self) -> None:
        """Export the program, time it here and predict it for the devices."""
        asked = self.recipe.export
        assert asked is not None
        self.progress("export", 0, 1, asked.target)
        source = exportable_from_split(self.model, self.test_split, self.recipe.model.max_length, asked, self.carried)
        artifact = to_program(source, self.folder / "model.pte", target=asked.target)
        self.progress("export", 1, 1, "")
        self.ledger = self.ledger.with_(program=artifact.program().model_copy(update={"path": artifact.path.name}))
        self.save()
        if self.recipe.profile is not None:
            before = replace(source, model=self.float_model, check_inputs=None) if self.float_model else None
            changes = profile_program(artifact, self.recipe.profile, before, find(asked.target), self.progress)
            self.ledger = self.ledger.with_(**changes)
        write_card(artifact.path, artifact.manifest, self.ledger)

    def compares_float(self) -> bool:
        """Whether the report compares the quantized program with the model before."""
        asked, profile = self.recipe.export, self.recipe.profile
        return bool(self.record and asked and not asked.language and profile and profile.compare_float)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The task's loss."""
        return self.task.loss(logits, labels)

    def sample(self, technique: Technique | None = None) -> Sample:
        """The data that a technique may use: as many batches as it calibrates on, at least the usual number."""
        wanted = (technique.batches_wanted if technique else None) or 0
        folder = self.folder / "checkpoints" if self.record and technique is not None else None
        times = layers_ms_of(self.test_split, self.recipe.model.max_length, self.recipe.export, self.carried)
        sample = self.samples.sample(self.loss, max(wanted, CALIBRATION_BATCHES))
        return replace(sample, progress=self.progress, folder=folder, layers_ms=times)

    def add_row(
        self, step: str, detail: str, seconds: float, exact: bool = False, note: str = "",
        shift: Shift | None = None, widths: BitWidths | None = None,
    ) -> None:  # fmt: skip
        """Measure the model and add a row, with the step's own note; reuse that of an earlier run of the same steps.

        After an `exact` step, which cannot change the outputs, quality is the last row's, and the row says so.
        """
        if not self.record:
            return
        index = len(self.ledger.rows)
        row = self.measured_before.get(self.digest)
        if row is None:
            self.progress("measure", 0, 1, f"after {step}")
            batch = self.samples.largest_batch(self.samples.batch_size)
            measures = measure(self.model, self.samples.example(), batch, self.loss)
            last = self.ledger.rows[-1].quality if exact else self.quality_of(self.model)
            note = join_notes([note, "not measured again: the step does not change the output" if exact else ""])
            row = Row(
                index=index, step=step, detail=detail, quality=last, seconds=seconds, note=note, digest=self.digest,
                measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"), shift=shift, widths=widths,
                **measures._asdict(),
            )  # fmt: skip
            self.progress("measure", 1, 1, quality_in_words(last) if last else "")
        self.ledger = self.ledger.with_(rows=(*self.ledger.rows, row.model_copy(update={"index": index})))
        self.save()

    def quality_of(self, model: nn.Module) -> Quality:
        """Any model's quality on the test set."""
        return quality(model, self.test_split, EVALUATION_BATCH)

    def save(self) -> None:
        """Write the ledger, and the report once finished."""
        from edgetune.report import write

        if not self.record:
            return
        if self.ledger.finished:
            write(self.ledger, self.folder)
        else:
            write_atomically(self.folder / "ledger.json", self.ledger.dumps())


def _distils(step: Step) -> bool:
    return isinstance(step.settings, Train) and step.settings.distill is not None
