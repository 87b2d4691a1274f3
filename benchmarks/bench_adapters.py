"""Adapter families beside LoRA and full fine-tuning: quality, memory and time of training, size, the merged program.

    python benchmarks/bench_adapters.py [--models "MiniLM,ViT-tiny"] [--methods "lora;dora;..."] [--seeds 3] [--keep]

The methods of `adapter_methods.py` each tune the same pretrained model to the same rows. Each method's learning rate is
the one of least loss on validation rows after half the updates, from three that are a factor of 3 apart, or up to five
while the best is the outermost; then it trains with each seed. Quality is that of the merged model on test rows, which
chose nothing. A step is timed beside one of full fine-tuning, in turn, in one process with one thread.
Writes docs/bench-adapters.md and .json after each; `--keep`: rows that the .json has already are not made again.
Exit code 1 where something held to is missed.
"""

from __future__ import annotations

from collections.abc import Sequence

from adapter_methods import DEPTH, GLORA, LORA, SHERL, TASKS, methods_of
from method_rows import ROOT, Row, RowOf, Table, Verdict, run

from edgetune.run.environment import installed_versions

OUT = ROOT / "docs" / "bench-adapters.json"
STAYS = (SHERL, "bottleneck")  # what does not merge
MOST_POINTS, MOST_SHARE = 1.0, 1 / 5  # that the adapted last half may lose to LoRA, and of its saved bytes
MOST_SHERL = 1 / 4  # of LoRA's saved bytes, on a model of 12 blocks whose states are wide beside sherl's


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """What the whole is held to."""
    table, checks = Table(rows), list[Verdict]()
    for name in TASKS:
        lora, searched, last = (table.values(name, method, "quality") for method in (LORA, GLORA, DEPTH))
        if lora and searched:
            mean = sum(searched) / len(searched)
            text = f"{name}: accuracy of {GLORA}: {mean:.2f} (at least that of lora's worst seed, {min(lora):.2f})"
            checks.append((mean >= min(lora), text))
        share = table.ratio(name, DEPTH, LORA, "saved_mib")
        if lora and last and share is not None:
            lost = sum(lora) / len(lora) - sum(last) / len(last)
            text = f"{name}: points that {DEPTH} loses to lora: {lost:.2f} (at most {MOST_POINTS:g})"
            checks.append((lost <= MOST_POINTS, text))
            text = f"{name}: its bytes saved for backward over lora's: {share:.3f} (at most {MOST_SHARE:g})"
            checks.append((share <= MOST_SHARE, text))
        share = table.ratio(name, SHERL, LORA, "deeper_saved_mib")
        if share is not None:
            text = f"BERT-base, 12 blocks, random weights: bytes that sherl saves over lora's: {share:.3f}"
            checks.append((share <= MOST_SHERL, f"{text} (at most {MOST_SHERL:g})"))
        ours = [row for row in table.rows if row["model"] == name and "same_program" in row]
        merged = {row["method"]: row["same_program"] for row in ours if row["method"] not in STAYS}
        if merged:
            other = [method for method, same in merged.items() if not same]
            text = f"{name}: {len(merged) - len(other)} of {len(merged)} merged programs are the base's"
            checks.append((not other, "; not: ".join([text, *([", ".join(other)] if other else [])])))
    return checks


def document(rows: Sequence[Row], checks: Sequence[Verdict]) -> str:
    """The page."""
    machine, table = installed_versions(), Table(rows)
    lines = [
        "# `make bench-adapters`: adapter families beside LoRA and full fine-tuning",
        "",
        f"Made by `python benchmarks/bench_adapters.py` on {machine['cpu']}, torch {machine['torch']}, one thread. "
        "MiniLM is tuned to the sentiment of tweets; ViT-tiny, pretrained on five classes of Fashion-MNIST, to the "
        "other five. The trainings are small, so that the whole takes hours on a small machine: what is compared is "
        "how far each method comes in the same few updates. `glora, searched` divides them between its supernet and "
        "the paths that it chose.",
        "",
        "*trains*: parameters without the new classifier, which trains with every method. *rate*: the learning rate, "
        "of those a factor of 3 apart the one of least loss on validation rows after half the updates; * the "
        "outermost of five. *step*: time of an update over that of full fine-tuning, median of pairs taken in turn. "
        "*saved*: memory saved for backward. *file*: what is kept beside the base, with the classifier. *program*: "
        "that of the finalized model; *base's*: the same operators with the same shapes as before tuning, and so as "
        "fast; else multiply-accumulates over the base's.",
        "",
        *(f"- {'reached' if met else 'MISSED'}: {text}" for met, text in checks),
    ]
    for name, task in TASKS.items():
        made = {row["method"]: row for row in table.rows if (row["model"], row["seed"]) == (name, 0)}
        if not made:
            continue
        head = next(row["head"] for row in made.values())
        lines += [
            "", f"## {name}", "", f"{task.describe()} The classifier has {head:,} parameters.", "",
            "| method | trains | accuracy, % | range | seeds | rate | step | saved, MiB | of lora's | file, KiB "
            "| program |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        lines += [_line(table, made[method]) for method in methods_of(task) if method in made]
        failed = {row["method"]: row["failed"] for row in rows if row["model"] == name and "failed" in row}
        lines += [f"| {method} | not made: {reason} |" + " |" * 8 for method, reason in failed.items()]
    return "\n".join(lines) + "\n"


def _line(table: Table, row: Row) -> str:
    """A method's line; `row`: that of its first seed."""
    name, method = row["model"], row["method"]
    seeds = len(table.values(name, method, "quality"))
    tried = sorted(map(float, row["rates"]))
    best = float(min(row["rates"], key=row["rates"].__getitem__))
    mark = "*" if best in (tried[0], tried[-1]) else ""
    share = table.ratio(name, method, LORA, "saved_mib")
    program = "base's" if row["same_program"] else f"x {row['macs']:.3f}"
    return (
        f"| {method} | {row['trainable']:,} | {table.spread(name, method, 'quality')} | {seeds} | "
        f"{row['rate']:.1e}{mark} | {row['step_ratio']:.2f} | {row['saved_mib']:.1f} | "
        f"{'' if share is None else f'{share:.3f}'} | {row['file_kib']:,.0f} | {program} |"
    )


def summarize(rows: Sequence[Row]) -> tuple[list[Verdict], str]:
    """Verdicts and page."""
    checks = verdicts(rows)
    return checks, document(rows, checks)


def start(name: str, seed: int) -> RowOf:
    """A model with a seed, in its process."""
    from bench_adapters_worker import Tuner

    return Tuner(name, seed).row


def main() -> None:
    """Tune, measure and write."""
    methods = {name: list(methods_of(task)) for name, task in TASKS.items()}
    run(__file__, (__doc__ or "").splitlines()[0], methods, start, OUT, summarize)


if __name__ == "__main__":
    main()
