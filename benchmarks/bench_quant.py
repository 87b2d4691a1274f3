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

import copy
import shutil
import statistics
import time
from collections.abc import Sequence
from typing import Any

from method_rows import ROOT, Row, Table, Verdict, file_name, run
from quant_models import TASKS, Task
from quant_others import others_of

from edgetune.run.environment import installed_versions

WORK = ROOT / "runs" / "bench-quant"
OUT = ROOT / "docs" / "bench-quant.json"
MIB = 2**20
Steps = list[dict[str, Any]]

FLOAT = "fp32"


def methods_of(task: Task) -> dict[str, Steps]:
    """The steps of every method that suits a model, by its name in the table."""
    wide = {"int8_linears": list(task.wide)} if task.wide else {}

    def int4(**settings: Any) -> dict[str, Any]:
        return {"int4": {**wide, **settings}}

    methods: dict[str, Steps] = {FLOAT: []}
    if task.kind == "image":
        observers = ("minmax", "percentile", "mse", "entropy")
        methods |= {f"int8 {observer}": [{"int8": {"observer": observer}}] for observer in observers}
        methods |= {
            "int8 auto": [{"int8": {"observer": "auto"}}],
            "int8 auto, biases": [{"int8": {"observer": "auto", "bias_correction": True}}],
        }
        return methods
    methods["int8_dynamic"] = [{"int8_dynamic": {}}]
    methods["int4 smallest"] = [int4(preset="smallest")]
    methods["int4 gptq g32, 4-bit tables"] = [int4(algorithm="gptq", embeddings="int4")]
    for group, name in ((32, "g32"), ("channel", "channel")):
        for algorithm in ("absmax", "mse", "awq", "gptq"):
            methods[f"int4 {algorithm} {name}"] = [int4(group_size=group, algorithm=algorithm)]
        gptq = int4(group_size=group, algorithm="gptq")
        methods[f"smooth, int4 gptq {name}"] = [{"smooth": {}}, gptq]
        if task.kind == "language":
            methods[f"rotate, int4 gptq {name}"] = [{"rotate": {}}, gptq]
        training = {"train": task.qat}
        methods[f"qat, int4 {name}"] = [{"qat": {"distill": 1.0}}, training, int4(group_size=group)]
    methods["quik"] = [{"quik": {}}]
    for average in (4.5, 5.0):  # 4.5: as large as int4 in groups of 32
        methods[f"bits {average}"] = [{"bits": {"average_bits": average}}]
    return methods


def names_of(name: str) -> list[str]:
    """Every row of a model's table."""
    return [*methods_of(TASKS[name]), *others_of(TASKS[name].kind, name)]


# In a process of its own


class Bench:
    """A trained model and its data."""

    def __init__(self, name: str, seed: int) -> None:
        import torch

        from edgetune.tasks.quality import distributions_on

        torch.set_num_threads(1)
        self.name, self.seed, self.task = name, seed, TASKS[name]
        self.fold = self.prepare([*self.task.train])
        trained = WORK / f"{file_name(name)}-{seed}.pt"
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

        self.folder = WORK / f"{file_name(self.name)}-{self.seed}"
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

        steps = methods_of(self.task)[method]

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
        model, file = quantize(copy.deepcopy(self.model), self.fold.train_split, self.folder / file_name(method))
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


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """What the whole is held to."""
    table, checks = Table(rows), list[Verdict]()
    of_text = [name for name, task in TASKS.items() if task.kind != "image"]

    def at_most(value: float | None, limit: float, text: str) -> None:
        if value is not None:
            checks.append((value <= limit, f"{text}: {value:.3g} (at most {limit:g})"))

    for name in of_text:
        gptq = table.ratio(name, "int4 gptq g32", "int4 absmax g32", "kl")
        at_most(gptq, 0.6, f"{name}: KL of gptq over absmax, groups of 32")
        channel = table.ratio(name, "int4 gptq channel", "int4 absmax g32", "kl")
        at_most(channel, 1.0, f"{name}: KL of gptq per channel over absmax in groups of 32")
        at_most(table.ratio(name, "bits 4.5", "int4 gptq g32", "kl"), 0.8, f"{name}: KL of bits 4.5 over uniform gptq")
        recovered = table.ratio(name, "qat, int4 channel", "int4 absmax channel", "kl")
        at_most(recovered, 0.5, f"{name}: KL after qat over absmax, per channel")
    for name, method, limit in (("small GPT", None, 1.02), ("small GPT", "qat", 1.01), ("SmolLM2", None, 1.05)):
        best = _best_perplexity(table, name, method)
        if best is not None:
            method_name, value = best
            at_most(value, limit, f"{name}: perplexity of {method_name} over the float model's")
    small = "int4 gptq g32, 4-bit tables"
    for name, method in (("MiniLM", small), ("EfficientNet-Lite0", "int8 auto, biases")):
        whole, rounded = table.mean(name, FLOAT, "quality"), table.mean(name, method, "quality")
        if whole is not None and rounded is not None:
            at_most(whole - rounded, 0.3, f"{name}: points lost by {method}")
    at_most(table.ratio("MiniLM", small, FLOAT, "file_mib"), 1 / 6.5, f"MiniLM: size of {small} over fp32's")
    checks += [verdict for name in of_text for verdict in _beside_random(table, name)]
    ours, theirs = _best_perplexity(table, "SmolLM2", None), table.mean("SmolLM2", "llama.cpp Q4_K_M", "quality")
    whole = table.mean("SmolLM2", FLOAT, "quality")
    if ours and theirs and whole:
        at_most(ours[1] * whole / theirs, 1.0, f"SmolLM2: perplexity of {ours[0]} over llama.cpp's Q4_K_M")
    for row in table.rows:
        if row["model"] in of_text and {"stored_mib", "file_mib"} <= row.keys():
            off = abs(row["file_mib"] / row["stored_mib"] - 1)
            if off > 0.02:
                checks.append((False, f"{row['model']} {row['method']}: size is {100 * off:.1f} % off the arithmetic"))
    return checks


def _beside_random(table: Table, name: str) -> list[Verdict]:
    """Whether allocations of `bits` are ahead of random ones of their size with every seed, rounded alike."""
    checks = []
    for method in methods_of(TASKS[name]):
        seeds: list[Any] = table.values(name, method, "compared")
        if seeds:
            own, chance, uniform = ([seed[of] for seed in seeds] for of in ("this", "random", "uniform"))
            text = "KL x 1000 of {}, held-out batches: {:.2f}, random {:.2f} to {:.2f}, uniform {:.2f}".format(
                method, *(1000 * x for x in (statistics.mean(own), min(chance), max(chance), statistics.mean(uniform)))
            )
            checks.append((max(own) < min(chance), f"{name}: {text}"))
    return checks


def _best_perplexity(table: Table, name: str, method: str | None) -> tuple[str, float] | None:
    """The method that begins so, or any without training, with the least perplexity, over that of the float model."""
    names = [m for m in methods_of(TASKS[name]) if m.startswith(method or "int4") or (not method and "int4" in m)]
    names = [m for m in names if method or not m.startswith("qat")]
    ratios = [(m, table.ratio(name, m, FLOAT, "quality")) for m in names]
    measured = [(m, ratio) for m, ratio in ratios if ratio is not None]
    return min(measured, key=lambda pair: pair[1]) if measured else None


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

    differences = table.values(name, method, "difference")
    difference = f"{max(differences):.1e}" if differences else ""
    return (
        f"| {method} | {table.spread(name, method, 'quality')} | {table.spread(name, method, 'kl', 1000)} | "
        f"{mean('flips_pct'):.2f} | {mean('file_mib'):.2f} | {difference} | {mean('cpu_s'):.0f} |"
    )


def summarize(rows: Sequence[Row]) -> tuple[list[Verdict], str]:
    """Verdicts and page."""
    checks = verdicts(rows)
    return checks, document(rows, checks)


def main() -> None:
    """Train, quantize, measure and write."""
    methods = {name: names_of(name) for name in TASKS}
    run(__file__, (__doc__ or "").splitlines()[0], methods, lambda name, seed: Bench(name, seed).row, OUT, summarize)


if __name__ == "__main__":
    main()
