"""Training programs beside PyTorch: planned arena, step time, and losses over 50 steps, on real data.

    python tests/bench_training.py [--tasks minilm,effnet-lite0] [--rows 8]     writes docs/bench-training.md

Arena: the plan of a training step and the weights that train; momentum is left out, since the stock export keeps it
outside. The scheme of `auto` is that of docs/bench-sparse-<task>.json. Stock: PyTorch's and ExecuTorch's own export of
the same frozen set. Step times are taken in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_sparse_worker import Worker

from edgetune.environment import environment
from edgetune.export.training.measure import loss_difference, step_times, stock_plan_bytes
from edgetune.export.training.step import Check, export_training

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("full", "last-2", "auto")
MIB = 2**20
STEPS, LEARNING_RATE, THREADS = 50, 0.01, 2


def measured(task: str, method: str, rows: int) -> dict[str, Any]:
    """One program, and what is held against it."""
    held = json.loads((ROOT / "docs" / f"bench-sparse-{task}.json").read_text(encoding="utf-8"))
    worker = Worker(task, method, scheme=held["scheme"])
    pad_to = worker.task.tokens
    batches = [worker.train_split.batch(range(n * rows, (n + 1) * rows), pad_to=pad_to) for n in range(STEPS)]
    inputs, labels = batches[0]
    with tempfile.TemporaryDirectory() as folder:
        artifact = export_training(
            worker.model, inputs, labels, Path(folder) / "train.pte", loss=worker.loss, momentum=0.9,
            check_batches=batches, check=Check(max_loss_difference=float("inf")),
        )  # fmt: skip
        weights = sum(p.nbytes for p in worker.model.parameters() if p.requires_grad)
        times = step_times(artifact, worker.model, (inputs, labels), worker.loss, threads=THREADS)
        differs = []
        for steps in (5, STEPS):
            again = Worker(task, method, scheme=held["scheme"])
            differs.append(loss_difference(artifact, again.model, batches, worker.loss, steps, LEARNING_RATE))
        stock = stock_plan_bytes(worker.model, inputs, labels, worker.loss)
        return {
            "task": task, "method": method, "arena_mib": (artifact.manifest.plan_bytes + weights) / MIB,
            "stock_mib": stock / MIB, "size_mib": artifact.manifest.size_bytes / MIB,
            "program_ms": times.program_ms, "eager_ms": times.eager_ms, "peak_mib": times.program_peak_mib,
            "after_5": differs[0], "after_50": differs[1], "delegated": artifact.manifest.delegated_macs_pct,
        }  # fmt: skip


def table(found: list[dict[str, Any]]) -> list[str]:
    """One row for each program."""
    lines = [
        "| model | trains | arena, MiB | full's / arena | stock's / arena | step, ms | of eager's | process, MiB "
        "| loss off after 5 | after 50 | MACs delegated |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    full = {row["task"]: row["arena_mib"] for row in found if row["method"] == "full"}
    for row in found:
        whole = f"{full[row['task']] / row['arena_mib']:.1f}" if row["task"] in full else ""
        lines.append(
            f"| {row['task']} | {row['method']} | {row['arena_mib']:.1f} | {whole} "
            f"| {row['stock_mib'] / row['arena_mib']:.2f} | {row['program_ms']:.0f} "
            f"| {row['program_ms'] / row['eager_ms']:.2f} | {row['peak_mib']:.0f} | {row['after_5']:.1e} "
            f"| {row['after_50']:.1e} | {row['delegated']:.1f} % |"
        )
    return lines


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", default="minilm,effnet-lite0")
    parser.add_argument("--rows", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    found = []
    for task in given.tasks.split(","):
        for method in METHODS:
            found.append(measured(task, method, given.rows))
            print(found[-1], file=sys.stderr)
    machine = environment()
    lines = [
        "# Training programs",
        "",
        f"Made by `python tests/bench_training.py` on {machine.cpu}, {THREADS} threads; batches of {given.rows} rows; "
        f"losses beside eager SGD, learning rate {LEARNING_RATE}, momentum 0.9.",
        "",
        *table(found),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    (ROOT / "docs" / "bench-training.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
