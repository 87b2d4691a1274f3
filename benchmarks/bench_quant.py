"""Every way to quantize a model, beside the float model it was made of: quality, size, time, latency beside others'.

    python benchmarks/bench_quant.py [--models "MiniLM,small GPT"] [--methods "int4 gptq g32;..."] [--seeds 3] [--keep]

Each model of `quant_models.py` is trained once for each seed. Every method then gets a copy of it, and the quality on
held-out rows, which chose nothing, stands beside that of the trained float model: the metric, the KL divergence and the
share of changed predictions. Each result of the first seed is exported: size, and largest difference from eager mode.
The methods of one model and seed run in one process, with one thread.
Writes docs/bench-quant.md and .json after each; `--keep`: rows that the .json has already are not made again.
Exit code 1 where something held to is missed.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_real import exit_with, write_results
from quant_methods import AS_UNIFORM, FLOAT, Steps, methods_of, names_of
from quant_models import TASKS
from quant_others import others_of
from quant_verdicts import Table, Verdict, verdicts

from edgetune.run.environment import installed_versions

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "runs" / "bench-quant"
OUT = ROOT / "docs" / "bench-quant.json"
MIB = 2**20
Row = dict[str, Any]


# In a process of its own


class Bench:
    """A trained model and its data."""

    def __init__(self, name: str, seed: int) -> None:
        import torch

        from edgetune.tasks.quality import distributions_on

        torch.set_num_threads(1)
        self.name, self.seed, self.task = name, seed, TASKS[name]
        self.fold = self.prepare([*self.task.train])
        trained = WORK / f"{_file_name(name)}-{seed}.pt"
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

        self.folder = WORK / f"{_file_name(self.name)}-{self.seed}"
        shutil.rmtree(self.folder, ignore_errors=True)  # with the checkpoints of an earlier run
        self.folder.mkdir(parents=True)
        return Fold(self.recipe(steps), self.folder, resume=False, progress=lambda *_: None, record=False)

    def recipe(self, steps: Steps) -> Any:
        """A recipe of these steps."""
        from edgetune.recipe import recipe

        parts = {"model": self.task.model, "data": self.task.data, "export": self.task.export, "seed": self.seed}
        return recipe.from_plain({"name": "bench-quant", **parts, "steps": steps or ["eval"]})

    def row(self, method: str) -> Row:
        """What a method makes of the model."""
        others = others_of(self.task.kind, self.name)
        return self.row_of_others(method, others[method]) if method in others else self.own_row(method)

    def own_row(self, method: str) -> Row:
        """What edgetune's steps make of it."""
        from edgetune.quant.size import stored_bytes
        from edgetune.run import reuse

        steps = self.with_sizes(methods_of(self.task)[method])
        fold = copy.copy(self.fold)
        fold.recipe = self.recipe(steps)
        fold.digests = reuse.step_digests(fold.recipe)
        fold.model, fold.teachers = copy.deepcopy(self.model).requires_grad_(True), {}
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        begun = time.process_time()
        fold.steps()
        seconds = time.process_time() - begun
        fold.model.requires_grad_(False)
        row = {**self.quality_of(fold.model), "cpu_s": seconds, "stored_mib": stored_bytes(fold.model) / MIB}
        allocation = getattr(fold.model, "edgetune_allocation", None)
        if allocation is not None:
            row["compared"] = {c.name: c.kl for c in allocation.compared}
        return row if self.seed else {**row, **self.exported(fold)}

    def with_sizes(self, steps: Steps) -> Steps:
        """The same steps, with the size of the model in uniform 4 bits where one asks for it."""
        import edgetune as et
        from edgetune.quant.size import stored_bytes

        if not any(AS_UNIFORM in settings.values() for step in steps for settings in step.values()):
            return steps
        wide = tuple(self.task.wide)
        uniform = et.apply(copy.deepcopy(self.model), et.Int4(algorithm="absmax", embeddings="int4", int8_linears=wide))
        return [{"bits": {"size_mib": stored_bytes(uniform) / MIB}}]

    def exported(self, fold: Any) -> Row:
        """What its program is. The seeds' programs are alike, so one is enough."""
        fold.export()
        program = fold.ledger.program
        return {
            "file_mib": program.size_mib,
            "difference": program.parity.max_relative_difference,
            "same_pct": program.parity.same_prediction_pct,
        }

    def row_of_others(self, method: str, quantize: Any) -> Row:
        """What another library makes of it."""
        begun = time.process_time()
        model, file = quantize(copy.deepcopy(self.model), self.fold.train_split, self.folder / _file_name(method))
        seconds = time.process_time() - begun
        row = {**self.quality_of(model), "cpu_s": seconds, "file_mib": file.stat().st_size / MIB}
        file.unlink()
        return row

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


def _file_name(name: str) -> str:
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in name).lower().split())


def worker_main(name: str, seed: int, methods: Sequence[str]) -> None:
    """Print a row for each method of one model, as it is made."""
    from edgetune.core.errors import EdgetuneError

    bench = Bench(name, seed)
    for method in methods:
        try:
            result = bench.row(method)
        except (EdgetuneError, ImportError) as error:
            result = {"failed": str(error)}
        print("\n" + json.dumps({"model": name, "seed": seed, "method": method, **result}), flush=True)


# The benchmark


def rows_from_worker(name: str, seed: int, methods: Sequence[str]) -> Iterator[Row]:
    """The rows of one model and seed, as its process prints them."""
    command = [sys.executable, __file__, "--worker", json.dumps([name, seed, list(methods)])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith('{"model"'):
                yield json.loads(line)
    if child.returncode:
        print(f"{name}, seed {seed}: the process ended with {child.returncode}", file=sys.stderr)


def document(rows: Sequence[Row], checks: Sequence[Verdict]) -> str:
    """The page."""
    machine, table = installed_versions(), Table(rows)
    lines = [
        "# `make bench-quant`: what quantization costs",
        "",
        f"Made by `python benchmarks/bench_quant.py` on {machine['cpu']}, torch {machine['torch']}, executorch "
        f"{machine['executorch']}. Mean and range over the seeds, on held-out test rows that chose nothing. KL and "
        "changed: from the trained float model. Seconds of processor time, one thread, training included.",
        "",
        *(f"- {'reached' if met else 'MISSED'}: {text}" for met, text in checks),
    ]
    for name, task in TASKS.items():
        if not table.values(name, FLOAT, "quality"):
            continue
        metric = "perplexity" if task.kind == "language" else "accuracy, %"
        seeds = len(table.values(name, FLOAT, "quality"))
        lines += [
            "", f"## {name}", "", f"{seeds} seed{'s' * (seeds != 1)}.", "",
            f"| method | {metric} | range | KL x 1000 | range | changed, % | file, MiB | difference | s |",
            "|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        lines += [_line(table, name, method) for method in names_of(name) if table.values(name, method, "quality")]
        failed = {row["method"]: row["failed"] for row in rows if row["model"] == name and "failed" in row}
        lines += [f"| {method} | not made: {reason} |" + " |" * 7 for method, reason in failed.items()]
    return "\n".join(lines) + "\n"


def _line(table: Table, name: str, method: str) -> str:
    def mean(figure: str) -> float:
        return statistics.mean(table.values(name, method, figure))

    def spread(figure: str, factor: float = 1.0, digits: int = 2) -> str:
        values = [factor * value for value in table.values(name, method, figure)]
        return f"{statistics.mean(values):.{digits}f} | {min(values):.{digits}f} to {max(values):.{digits}f}"

    differences = table.values(name, method, "difference")
    difference = f"{max(differences):.1e}" if differences else ""
    return (
        f"| {method} | {spread('quality')} | {spread('kl', 1000)} | {mean('flips_pct'):.2f} | {mean('file_mib'):.2f} | "
        f"{difference} | {mean('cpu_s'):.0f} |"
    )


def main() -> None:
    """Train, quantize, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(TASKS))
    parser.add_argument("--methods", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker_main(*json.loads(given.worker))
        return
    unknown = sorted(set(given.models.split(",")) - set(TASKS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; allowed: {', '.join(TASKS)}")
    rows: list[Row] = json.loads(given.out.read_text())["rows"] if given.keep and given.out.exists() else []
    rows = [row for row in rows if "failed" not in row]
    for seed in range(given.seeds):
        for name in given.models.split(","):
            wanted = [m for m in names_of(name) if not given.methods or m in given.methods.split(";")]
            made = {row["method"] for row in rows if (row["model"], row["seed"]) == (name, seed)}
            missing = [method for method in wanted if method not in made]
            for row in rows_from_worker(name, seed, missing) if missing else ():
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
                write(rows, given.out)
    exit_with(write(rows, given.out))


def write(rows: Sequence[Row], out: Path) -> list[Verdict]:
    """Write the figures and the page."""
    checks = verdicts(rows)
    write_results(out, rows, checks, document(rows, checks))
    return checks


if __name__ == "__main__":
    main()
