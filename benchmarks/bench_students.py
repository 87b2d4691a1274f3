"""Students of a fine-tuned MiniLM, with fewer blocks: by labels alone, by the teacher's logits, by hidden states too.

    python benchmarks/bench_students.py [--methods "3 blocks, labels;..."] [--seeds 3] [--keep]

The teacher is trained once for each seed. A student keeps 4, 3 or 2 of its 6 blocks, spread evenly, and trains for as
long as every other; quality on held-out tweets, which chose nothing. The learning rate is the best on validation rows
of those in `RATES`, for each loss alike, tried with 3 blocks and the first seed. The programs of the first seed are
exported in 4 bits: size, and largest difference from eager mode.
Writes docs/bench-students.md and .json after each row. Exit code 1 where something held to is missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from method_rows import ROOT, Row, Table, Verdict, run
from quant_models import TASKS
from trained_models import Steps, Trained

from edgetune.quant.int4 import Int4
from edgetune.run.environment import installed_versions

WORK = ROOT / "runs" / "bench-students"
OUT = ROOT / "docs" / "bench-students.json"
MODEL, TEACHER = "MiniLM", "the teacher, 6 blocks"
BLOCKS = (4, 3, 2)
LOSSES: dict[str, dict[str, Any]] = {
    "labels": {},
    "logits": {"distill": {"teacher": "depth", "weight": 0.5}},
    "logits and hidden states": {"distill": {"teacher": "depth", "weight": 0.5, "hidden": 1.0}},
}
RATES = (1e-4, 2e-4, 4e-4)
UPDATES = 228
MOST_LOST = {4: 1.0, 3: 2.0}  # points of accuracy


def method_of(blocks: int, loss: str) -> str:
    """A row's name."""
    return f"{blocks} blocks, {loss}"


METHODS = [TEACHER, *(method_of(blocks, loss) for blocks in BLOCKS for loss in LOSSES)]


class Students(Trained):
    """A teacher and what its students reach."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__(name, seed, TASKS[name], WORK)

    def row(self, method: str) -> Row:
        """One student."""
        if method == TEACHER:
            return self.finished([])
        blocks, _, loss = method.partition(" blocks, ")
        return self.finished(steps_of(int(blocks), loss, self.rate(loss)))

    def finished(self, steps: Steps) -> Row:
        """Quality in fp32; of the first seed, the program's in 4 bits too."""
        fold, row = self.changed_by(steps)
        if self.seed:
            return row
        fold.technique(Int4())
        return {**row, "int4_quality": self.quality_of(fold.model)["quality"], **self.exported(fold)}

    def rate(self, loss: str) -> float:
        """The learning rate that was best on validation rows, with 3 blocks."""
        return self.best_rate(loss, RATES, lambda rate: steps_of(3, loss, rate))


def steps_of(blocks: int, loss: str, rate: float) -> Steps:
    """The steps of a student."""
    training = {"updates": UPDATES, "batch_size": 32, "learning_rate": rate, **LOSSES[loss]}
    return [{"depth": {"blocks": blocks}}, {"train": training}]


def summarize(rows: Sequence[Row]) -> tuple[list[Verdict], str]:
    """Verdicts and page."""
    table = Table(rows)
    checks = list(verdicts(table))
    machine = installed_versions()
    lines = [
        "# `make bench-students`: a MiniLM's students",
        "",
        f"Made by `python benchmarks/bench_students.py` on {machine['cpu']}, torch {machine['torch']}. Accuracy on "
        "held-out tweets that chose nothing, mean and range over the seeds; learning rates chosen on validation rows. "
        "Changed: answers other than the teacher's. File and accuracy in 4 bits: the first seed's program.",
        "",
        *(f"- {'reached' if met else 'MISSED'}: {text}" for met, text in checks),
        "",
        "| model | seeds | accuracy, % | range | changed, % | in 4 bits, % | file, MiB | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        if not table.values(MODEL, method, "quality"):
            continue
        means = [table.mean(MODEL, method, figure) for figure in ("flips_pct", "int4_quality", "file_mib", "cpu_s")]
        cells = ["" if mean is None else f"{mean:.{digits}f}" for mean, digits in zip(means, (2, 2, 2, 0), strict=True)]
        seeds = len(table.values(MODEL, method, "quality"))
        lines.append(f"| {method} | {seeds} | {table.spread(MODEL, method, 'quality')} | {' | '.join(cells)} |")
    return checks, "\n".join(lines) + "\n"


def verdicts(table: Table) -> list[Verdict]:
    """What the students are held to."""
    checks: list[Verdict] = []
    teacher = table.mean(MODEL, TEACHER, "quality")
    for blocks in BLOCKS:
        means = {loss: table.mean(MODEL, method_of(blocks, loss), "quality") for loss in LOSSES}
        both = means["logits and hidden states"]
        if both is None or teacher is None:
            continue
        if blocks in MOST_LOST:
            lost = teacher - both
            most = MOST_LOST[blocks]
            checks.append((lost <= most, f"{blocks} blocks: {lost:.2f} points below the teacher (at most {most:g})"))
        if means["labels"] is not None:
            won = both - means["labels"]
            checks.append((won >= 0, f"{blocks} blocks: {won:+.2f} points by the teacher (at least 0)"))
    return checks


def main() -> None:
    """Train the teachers and their students, measure and write."""
    WORK.mkdir(parents=True, exist_ok=True)
    summary = (__doc__ or "").splitlines()[0]
    run(__file__, summary, {MODEL: METHODS}, lambda name, seed: Students(name, seed).row, OUT, summarize)


if __name__ == "__main__":
    main()
