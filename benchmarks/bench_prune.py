"""What to cut: every importance beside random and magnitude, refitted or not, before and after recovery.

    python benchmarks/bench_prune.py [--models "MiniLM,ViT-tiny"] [--methods "fisher 30 %;..."] [--seeds 3] [--keep]

Each model of `quant_models.py` is trained once for each seed, and every method prunes a copy of it to about 30 and
50 % fewer multiply-accumulates. Quality is that on held-out rows, which chose nothing, beside the KL divergence and the
share of changed predictions from the unpruned model. Recovery distils from the unpruned model; its learning rate is the
best of `RATES` on validation rows, with the first seed, for each share alike.
Writes docs/bench-prune.md and .json after each row. Exit code 1 where something held to is missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from method_rows import ROOT, Row, Table, Verdict, run
from quant_models import TASKS
from trained_models import Steps, Trained

from edgetune.run.environment import installed_versions

WORK = ROOT / "runs" / "bench-prune"
OUT = ROOT / "docs" / "bench-prune.json"
WHOLE, RECOVERED = "unpruned", "activation, recovered"
RATIOS = {  # of widths, for about 30 and 50 % fewer multiply-accumulates
    "MiniLM": {30: 0.3, 50: 0.5},
    "ViT-tiny": {30: 0.3, 50: 0.5},
    "EfficientNet-Lite0": {30: 0.17, 50: 0.31},
}
WAYS: dict[str, dict[str, Any]] = {
    "random": {"importance": "random"},
    "magnitude": {"importance": "magnitude"},
    "activation, means alone": {"repair": False},
    "activation": {},
    "activation, all layers together": {"ranking": "global"},
    "wanda": {"importance": "wanda"},
    "flap": {"importance": "flap"},
    "taylor": {"importance": "taylor"},
    "fisher": {"importance": "fisher"},
}
RECOVERIES = {RECOVERED: {}, "fisher, recovered": {"importance": "fisher"}, "magnitude, recovered": WAYS["magnitude"]}
RATES = (1e-4, 2e-4, 4e-4)
MOST_LOST = {30: 1.0, 50: 2.0}  # points of accuracy after recovery


def method_of(way: str, share: int) -> str:
    """A row's name."""
    return f"{way}, {share} %"


METHODS = [WHOLE, *(method_of(way, share) for share in (30, 50) for way in (*WAYS, *RECOVERIES))]


class Pruned(Trained):
    """A trained model and what pruning leaves of it."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__(name, seed, TASKS[name], WORK)

    def row(self, method: str) -> Row:
        """One way."""
        if method == WHOLE:
            return self.measured([])
        way, _, share = method.removesuffix(" %").rpartition(", ")
        if way in WAYS:
            return self.measured(self.pruning(WAYS[way], int(share)))
        settings = RECOVERIES[way]
        return self.measured(self.recovering(settings, int(share), self.rate(int(share))))

    def measured(self, steps: Steps) -> Row:
        """Quality, and multiply-accumulates over those of the whole model; of the first seed, the program's size."""
        fold, row = self.changed_by(steps)
        row["macs"] = macs_of(fold.model, fold) / macs_of(self.model, self.fold)
        return row if self.seed else {**row, **self.exported(fold)}

    def pruning(self, settings: dict[str, Any], share: int) -> Steps:
        """The step that prunes."""
        return [{"prune": {"ratio": RATIOS[self.name][share], "round_to": 1, **settings}}]

    def recovering(self, settings: dict[str, Any], share: int, rate: float) -> Steps:
        """Pruning, and a training as long as the first, by the unpruned model's answers."""
        ((_, first),) = self.task.train[0].items()
        training = {**first, "learning_rate": rate, "distill": {"teacher": "prune", "weight": 0.5}}
        return [*self.pruning(settings, share), {"train": training}]

    def rate(self, share: int) -> float:
        """The learning rate of the recovery that was best on validation rows."""
        return self.best_rate(str(share), RATES, lambda rate: self.recovering({}, share, rate))


def macs_of(model: Any, fold: Any) -> float:
    """Multiply-accumulates of one row."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from edgetune.core.inputs import call, first_rows

    inputs = first_rows(fold.sample().inputs)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        call(model, inputs)
    return counter.get_total_flops() / 2


def summarize(rows: Sequence[Row]) -> tuple[list[Verdict], str]:
    """Verdicts and page."""
    table = Table(rows)
    checks = list(verdicts(table))
    machine = installed_versions()
    lines = [
        "# `make bench-prune`: what to cut",
        "",
        f"Made by `python benchmarks/bench_prune.py` on {machine['cpu']}, torch {machine['torch']}. Accuracy on "
        "held-out rows that chose nothing, mean and range over the seeds; KL and changed: from the unpruned model. "
        "What reads a unit that goes is refitted by least squares, but for *means alone*, magnitude and random. MACs: "
        "over the unpruned model's. File: of the first seed's program.",
        "",
        *(f"- {'reached' if met else 'MISSED'}: {text}" for met, text in checks),
    ]
    for name in RATIOS:
        if not table.values(name, WHOLE, "quality"):
            continue
        lines += ["", f"## {name}", ""]
        lines += ["| method | seeds | accuracy, % | range | KL x 1000 | range | changed, % | MACs | file, MiB | s |"]
        lines += ["|---" * 10 + "|"]
        for method in METHODS:
            if seeds := len(table.values(name, method, "quality")):
                spread = " | ".join(table.spread(name, method, *each) for each in (("quality",), ("kl", 1000)))
                means = [table.mean(name, method, figure) for figure in ("flips_pct", "macs", "file_mib", "cpu_s")]
                cells = " | ".join("" if m is None else f"{m:.{d}f}" for m, d in zip(means, (2, 2, 2, 0), strict=True))
                lines.append(f"| {method} | {seeds} | {spread} | {cells} |")
    return checks, "\n".join(lines) + "\n"


def verdicts(table: Table) -> list[Verdict]:
    """What pruning is held to."""
    checks: list[Verdict] = []
    for name in RATIOS:
        whole = table.mean(name, WHOLE, "quality")
        for share, most in MOST_LOST.items():
            recovered = table.mean(name, method_of(RECOVERED, share), "quality")
            if whole is not None and recovered is not None:
                text = f"{name}, {share} % fewer MACs: {whole - recovered:.2f} points lost after recovery"
                checks.append((whole - recovered <= most, f"{text} (at most {most:g})"))
            kept = {way: table.mean(name, method_of(way, share), "kl") for way in ("activation", "random", "magnitude")}
            ours = kept.pop("activation")
            for other, kl in kept.items():
                if ours is not None and kl is not None:
                    text = f"{name}, {share} %: KL of activation over that of {other}: {ours / kl:.2f}"
                    checks.append((ours < kl, f"{text} (below 1)"))
    return checks


def main() -> None:
    """Train, prune, measure and write."""
    WORK.mkdir(parents=True, exist_ok=True)
    summary = (__doc__ or "").splitlines()[0]
    run(__file__, summary, dict.fromkeys(RATIOS, METHODS), lambda name, seed: Pruned(name, seed).row, OUT, summarize)


if __name__ == "__main__":
    main()
