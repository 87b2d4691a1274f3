"""The main job with three seeds: quality with its spread beside the fp32 model and both baselines, sizes, parity.

    python benchmarks/bench.py [--full] [RECIPE] [key=value ...]     writes docs/bench.md; about 15 minutes on two cores

`--full` adds a model of which every weight is fine-tuned for as long, with three seeds too: 15 minutes more.

The fp32 model is the fine-tuned one before anything is taken away: the row of the ledger before `prune`. The test set
chooses nothing: every setting stands in the recipe, and training never sees a test row.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from edgetune.cli.progress import show_progress
from edgetune.core.ledger import Ledger
from edgetune.recipe import recipe
from edgetune.recipe.overrides import parse_overrides
from edgetune.run import fold, pipeline, runs
from edgetune.run.environment import detect_environment

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)


def spread(values: list[float]) -> str:
    """Mean and standard deviation, and the values themselves."""
    each = " / ".join(f"{v:.2f}" for v in values)
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} | {each}"


def before_prune(ledger: Ledger) -> float:
    """Quality of the fine-tuned fp32 model."""
    lossy = next(row.index for row in ledger.rows if row.step in ("prune", "int4", "int8"))
    return quality(ledger, lossy - 1)


def quality(ledger: Ledger, index: int) -> float:
    """Quality in a row."""
    found = ledger.rows[index].quality
    assert found is not None
    return found.value


def fp32_sizes(name: str, changes: dict[str, Any], out: Path) -> dict[str, float]:
    """MiB of the fp32 programs of the same model, whole and pruned. Training changes no size, so there is none."""
    found = {}
    for label, steps in (("whole", ("eval",)), ("pruned", ("prune",))):
        whole = recipe.load(name, changes)
        kept = [s for s in whole.steps if s.name in steps] or [recipe.Step(name="eval", settings=fold.Eval())]
        found[label] = run(whole.model_copy(update={"steps": tuple(kept), "profile": None, "budget": ()}), out)
    return {label: ledger.program.size_mib for label, ledger in found.items() if ledger.program}


def full_fine_tuning(name: str, changes: dict[str, Any], out: Path, seed: int) -> float:
    """Quality when every weight trains for as long as the recipe's first `train`: the reference without any saving."""
    whole = recipe.load(name, {**changes, "seed": seed})
    first = next(s for s in whole.steps if s.name == "train")
    settings = first.settings.model_copy(update={"learning_rate": 1e-4})
    steps = (recipe.Step(name="train", settings=settings),)
    ledger = run(whole.model_copy(update={"steps": steps, "export": None, "profile": None, "budget": ()}), out)
    return quality(ledger, -1)


def run(what: recipe.Recipe, out: Path) -> Ledger:
    """Run one recipe in a folder of its own; a finished run of the very same recipe is taken as it is."""
    for digest in sorted(out.parent.rglob("digest.txt")):
        earlier = runs.read_ledger(digest.parent)
        same = digest.read_text(encoding="utf-8").startswith(what.digest + "\n")
        if same and earlier is not None and earlier.finished:
            print(f"taken from {digest.parent.relative_to(ROOT)}", file=sys.stderr)
            return earlier
    number = 1 + max((int(path.name[-3:]) for path in out.glob(f"{what.name}-*")), default=0)
    with show_progress() as progress:
        return pipeline.run(what, out=out / f"{what.name}-{number:03d}", progress=progress).ledger


def main() -> None:
    """Run, print and write the table."""
    given = sys.argv[1:]
    whole = "--full" in given
    given = [word for word in given if word != "--full"]
    name = given.pop(0) if given and "=" not in given[0] else "text-minilm"
    changes, out = parse_overrides(given), ROOT / "runs" / "bench"
    ledgers = [run(recipe.load(name, {**changes, "seed": seed}), out) for seed in SEEDS]
    full = [full_fine_tuning(name, changes, out, seed) for seed in SEEDS] if whole else []
    sizes = fp32_sizes(name, changes, out)
    final = [quality(ledger, -1) for ledger in ledgers]
    tuned = [before_prune(ledger) for ledger in ledgers]
    program = ledgers[0].program
    assert program is not None
    parities = [ledger.program.parity for ledger in ledgers if ledger.program and ledger.program.parity]
    machine = detect_environment()
    lines = [
        f"# `make bench`: {name}",
        "",
        f"Made by `python benchmarks/bench.py` on {machine.cpu}, {machine.cores} cores; seeds {SEEDS}; "
        f"{ledgers[0].rows[-1].quality.rows} held-out rows that were not used for any choice.",  # type: ignore[union-attr]
        "",
        "| test accuracy, % | mean ± deviation | each seed |",
        "|---|---|---|",
        *(f"| {b.name} | {b.value:.2f} | |" for b in ledgers[0].baselines),
        *([f"| every weight fine-tuned, fp32 | {spread(full)} |"] if whole else []),
        f"| fine-tuned by the recipe, fp32, before pruning | {spread(tuned)} |",
        f"| final: pruned, distilled, 4 bits | {spread(final)} |",
        "",
        "| goal | reached |",
        "|---|---|",
        f"| within 1.5 points of the fp32 model | {statistics.mean(tuned) - statistics.mean(final):+.2f} points lost |",
        f"| `.pte` at most 1/4 of fp32's | {program.size_mib:.2f} MiB; fp32 whole {sizes['whole']:.2f} "
        f"(1/{sizes['whole'] / program.size_mib:.2f}), fp32 pruned {sizes['pruned']:.2f} "
        f"(1/{sizes['pruned'] / program.size_mib:.2f}) |",
        "| same prediction as the eager quantized model, % | "
        + " / ".join(f"{p.same_prediction_pct:.2f}" for p in parities)
        + f" of {program.parity.rows if program.parity else 0} rows |",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / ("bench.md" if name == "text-minilm" else f"bench-{name}.md")).write_text(text, encoding="utf-8")
    held = {
        "within 1.5 points": statistics.mean(tuned) - statistics.mean(final) <= 1.5,
        "above both baselines": statistics.mean(final) > max(b.value for b in ledgers[0].baselines),
        "a quarter of fp32": 4 * program.size_mib <= min(sizes.values()),
        "same predictions on 99.5 %": min(p.same_prediction_pct for p in parities) >= 99.5,
    }
    for line, reached in held.items():
        print(f"{'reached' if reached else 'MISSED'}: {line}")
    sys.exit(0 if all(held.values()) else 1)


if __name__ == "__main__":
    main()
