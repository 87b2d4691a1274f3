"""A model that is trained once for each seed, kept on disk, and given to every method of a benchmark as a copy."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from method_rows import Row, file_name

Steps = list[dict[str, Any]]
MIB = 2**20


class Trained:
    """A trained model and its data, in a process of its own: with one thread."""

    def __init__(self, name: str, seed: int, task: Any, work: Path) -> None:
        """`task`: model, data, the steps that train it, and how to export. `work`: the folder of models and runs."""
        import torch

        from edgetune.tasks.quality import distributions_on

        torch.set_num_threads(1)
        self.name, self.seed, self.task, self.folder = name, seed, task, work / f"{file_name(name)}-{seed}"
        self.fold = self.prepare([*task.train])
        self.rates = work / f"{file_name(name)}-rates.json"
        trained = work / f"{file_name(name)}-{seed}.pt"
        if trained.exists():
            self.model = torch.load(trained, weights_only=False)
        else:
            self.fold.steps()
            self.model = self.fold.model
            torch.save(self.model, trained)
        self.model.eval().requires_grad_(False)
        self.before = distributions_on(self.model, self.fold.test_split)

    def prepare(self, steps: Steps) -> Any:
        """A recipe of these steps, with model and data loaded."""
        from edgetune.run.fold import Fold

        shutil.rmtree(self.folder, ignore_errors=True)  # with the checkpoints of an earlier run
        self.folder.mkdir(parents=True)
        return Fold(self.recipe(steps), self.folder, resume=False, progress=lambda *_: None, record=False)

    def recipe(self, steps: Steps) -> Any:
        """A recipe of these steps."""
        from edgetune.recipe import recipe

        parts = {"model": self.task.model, "data": self.task.data, "export": self.task.export, "seed": self.seed}
        return recipe.from_plain({"name": "bench", **parts, "steps": steps or ["eval"]})

    def changed_by(self, steps: Steps) -> tuple[Any, Row]:
        """The fold after steps on a copy of the model, and its row: quality, seconds of processor time, size."""
        from edgetune.quant.size import stored_bytes
        from edgetune.run import reuse

        fold = copy.copy(self.fold)
        fold.recipe = self.recipe(steps)
        fold.digests = reuse.step_digests(fold.recipe)
        fold.model, fold.teachers = copy.deepcopy(self.model).requires_grad_(True), {}
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        begun = time.process_time()
        fold.steps()
        seconds = time.process_time() - begun
        fold.model.requires_grad_(False)
        return fold, {**self.quality_of(fold.model), "cpu_s": seconds, "stored_mib": stored_bytes(fold.model) / MIB}

    def best_rate(self, key: str, rates: Sequence[float], steps_of: Callable[[float], Steps]) -> float:
        """The learning rate that is best on validation rows, kept for all seeds under a key."""
        from edgetune.tasks.quality import quality

        chosen: dict[str, float] = json.loads(self.rates.read_text()) if self.rates.exists() else {}
        if key not in chosen:
            reached: dict[float, float] = {}
            for rate in rates:
                fold, _ = self.changed_by(steps_of(rate))
                reached[rate] = quality(fold.model, fold.validation_split, 64).value
            chosen[key] = max(reached, key=reached.__getitem__)
            self.rates.write_text(json.dumps(chosen))
        return chosen[key]

    def exported(self, fold: Any) -> Row:
        """What its program is. The seeds' programs are alike, so one is enough."""
        fold.export()
        program = fold.ledger.program
        row = {
            "file_mib": program.size_mib,
            "difference": program.parity.max_relative_difference,
            "same_pct": program.parity.same_prediction_pct,
        }
        ties = program.parity.ties
        return row if ties is None else {**row, "ties": ties.max_relative_difference}

    def quality_of(self, model: Any) -> Row:
        """The metric on test rows, and the shift from the trained float model."""
        from edgetune.tasks.quality import batches_of, distributions_in, shift_between

        split = self.fold.test_split
        batches = list(batches_of(model, split, 64))
        after = distributions_in(batches)
        assert self.before is not None
        assert after is not None
        shift = shift_between(self.before, after)
        value = split.task.quality(batches, split.rows).value
        return {"quality": value, "kl": shift.kl_divergence, "flips_pct": shift.changed_pct}
