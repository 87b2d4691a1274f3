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
import statistics
import time
from collections.abc import Sequence
from typing import Any

from method_rows import ROOT, Row, Table, Verdict, file_name, run
from quant_methods import AS_UNIFORM, FLOAT, methods_of, names_of
from quant_models import TASKS
from quant_others import others_of
from quant_verdicts import verdicts
from trained_models import MIB, Steps, Trained

from edgetune.run.environment import installed_versions

WORK = ROOT / "runs" / "bench-quant"
OUT = ROOT / "docs" / "bench-quant.json"


# In a process of its own


class Bench(Trained):
    """A trained model that every method quantizes."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__(name, seed, TASKS[name], WORK)

    def row(self, method: str) -> Row:
        """What a method makes of the model."""
        others = others_of(self.task.kind, self.name)
        return self.row_of_others(method, others[method]) if method in others else self.own_row(method)

    def own_row(self, method: str) -> Row:
        """What edgetune's steps make of it."""
        fold, row = self.changed_by(self.with_sizes(methods_of(self.task)[method]))
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

    def row_of_others(self, method: str, quantize: Any) -> Row:
        """What another library makes of it."""
        begun = time.process_time()
        model, file = quantize(copy.deepcopy(self.model), self.fold.train_split, self.folder / file_name(method))
        seconds = time.process_time() - begun
        row = {**self.quality_of(model), "cpu_s": seconds, "file_mib": file.stat().st_size / MIB}
        file.unlink()
        return row


def document(rows: Sequence[Row], checks: Sequence[Verdict]) -> str:
    """The page."""
    machine, table = installed_versions(), Table(rows)
    lines = [
        "# `make bench-quant`: what quantization costs",
        "",
        f"Made by `python benchmarks/bench_quant.py` on {machine['cpu']}, torch {machine['torch']}, executorch "
        f"{machine['executorch']}. Mean and range over the seeds, on held-out test rows that chose nothing. KL and "
        "changed: from the trained float model. Difference: of the program from the quantized model, beside what "
        "rounding ties alone move that by. Seconds of processor time, one thread, training included.",
        "",
        *(f"- {'reached' if met else 'MISSED'}: {text}" for met, text in checks),
    ]
    for name, task in TASKS.items():
        if not table.values(name, FLOAT, "quality"):
            continue
        metric = "perplexity" if task.kind == "language" else "accuracy, %"
        lines += [
            "", f"## {name}", "",
            f"| method | seeds | {metric} | range | KL x 1000 | range | changed, % | file, MiB | difference | ties | "
            "s |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        lines += [_line(table, name, method) for method in names_of(name) if table.values(name, method, "quality")]
        failed = {row["method"]: row["failed"] for row in rows if row["model"] == name and "failed" in row}
        lines += [f"| {method} | not made: {reason} |" + " |" * 9 for method, reason in failed.items()]
    return "\n".join(lines) + "\n"


def _line(table: Table, name: str, method: str) -> str:
    def mean(figure: str) -> float:
        return statistics.mean(table.values(name, method, figure))

    def largest(figure: str) -> str:
        values = table.values(name, method, figure)
        return f"{max(values):.1e}" if values else ""

    spread = " | ".join(table.spread(name, method, *figure) for figure in (("quality",), ("kl", 1000)))
    return (
        f"| {method} | {len(table.values(name, method, 'quality'))} | {spread} | {mean('flips_pct'):.2f} | "
        f"{mean('file_mib'):.2f} | {largest('difference')} | {largest('ties')} | {mean('cpu_s'):.0f} |"
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
