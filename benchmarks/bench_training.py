"""Training programs beside PyTorch: planned arena, step time, and losses over 50 steps, on real data.

    python benchmarks/bench_training.py [--tasks minilm,effnet-lite0] [--methods full,last-2,auto] [--rows 8]

Arena: the plan of a training step and the weights that train; momentum is left out, since the stock export keeps it
outside. The scheme of `auto` is that of docs/bench-sparse-<task>.json; eager keeps its activations whole here, as the
program does. Stock: PyTorch's and ExecuTorch's own export of the same frozen set. Step times are taken in turn.
Losses are those of 50 steps; beside their difference to eager's stands how far eager's own move when every weight that
trains moves by 1e-7 of itself.
Writes docs/bench-training.md and .json; rows that are not measured this time are taken from there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_sparse_worker import TASKS, Worker

from edgetune.export.training.step import Batch, Check, eager_losses, export_training
from edgetune.run.environment import detect_environment
from support.training_measures import loss_difference, step_times, stock_plan_bytes

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("full", "last-2", "auto")
MIB = 2**20
STEPS, MOMENTUM, NUDGE, THREADS = 50, 0.9, 1e-7, 2
LEARNING_RATES = {"minilm": 1e-2, "effnet-lite0": 1e-4}  # of SGD; at 1e-3 a nudged EfficientNet's losses move by 0.8


def measured(task: str, method: str, rows: int, times: dict[str, float]) -> dict[str, Any]:
    """One program, and what is held against it; the step is timed where `times` is empty."""
    held = json.loads((ROOT / "docs" / f"bench-sparse-{task}.json").read_text(encoding="utf-8"))
    worker = Worker(task, method, scheme=held["scheme"])
    pad_to = worker.task.tokens
    batches = [worker.train_split.batch(range(n * rows, (n + 1) * rows), pad_to=pad_to) for n in range(STEPS)]
    inputs, labels = batches[0]
    with tempfile.TemporaryDirectory() as folder:
        artifact = export_training(
            worker.model, inputs, labels, Path(folder) / "train.pte", loss=worker.loss, momentum=MOMENTUM,
            check_batches=batches, check=Check(max_loss_difference=float("inf")),
        )  # fmt: skip
        weights = sum(p.nbytes for p in worker.model.parameters() if p.requires_grad)
        if not times:
            found = step_times(artifact, worker.model, (inputs, labels), worker.loss, threads=THREADS)
            times = {
                "program_ms": found.program_ms, "eager_ms": found.eager_ms, "peak_mib": found.program_peak_mib
            }  # fmt: skip
        rate, again = LEARNING_RATES[task], Worker(task, method, scheme=held["scheme"])
        differs = loss_difference(artifact, again.model, batches, worker.loss, STEPS, rate)
        stock = stock_plan_bytes(worker.model, inputs, labels, worker.loss)
        return {
            "task": task, "method": method, "arena_mib": (artifact.manifest.main.plan_bytes + weights) / MIB,
            "stock_mib": stock / MIB, "size_mib": artifact.manifest.size_bytes / MIB,
            "differs": differs, "nudged_differs": nudged(task, method, held["scheme"], batches),
            "delegated": artifact.manifest.main.delegated_macs_pct, **times,
        }  # fmt: skip


def nudged(task: str, method: str, scheme: Any, batches: list[Batch]) -> float:
    """How far eager's own losses move over the steps when its weights are moved a little at the begin."""
    losses = []
    for nudge in (0.0, NUDGE):
        worker = Worker(task, method, scheme=scheme)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in worker.model.parameters():
                if weight.requires_grad:
                    weight *= 1 + nudge * torch.randn(weight.shape, generator=generator)
        losses.append(eager_losses(worker.model, batches, worker.loss, MOMENTUM, LEARNING_RATES[task]))
    return max(abs(a - b) for a, b in zip(*losses, strict=True))


def table(found: list[dict[str, Any]]) -> list[str]:
    """One row for each program."""
    lines = [
        "| model | trains | arena, MiB | full / this | stock planner / this | step, ms | step / eager | process, MiB "
        "| largest loss difference | same, eager perturbed | MACs delegated |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    full = {row["task"]: row["arena_mib"] for row in found if row["method"] == "full"}
    for row in found:
        whole = f"{full[row['task']] / row['arena_mib']:.1f}" if row["task"] in full else ""
        lines.append(
            f"| {row['task']} | {row['method']} | {row['arena_mib']:.1f} | {whole} "
            f"| {row['stock_mib'] / row['arena_mib']:.2f} | {row['program_ms']:.0f} "
            f"| {row['program_ms'] / row['eager_ms']:.2f} | {row['peak_mib']:.0f} | {row['differs']:.1e} "
            f"| {row['nudged_differs']:.1e} | {row['delegated']:.1f} % |"
        )
    return lines


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", default="minilm,effnet-lite0")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--keep-times", action="store_true", help="of the steps, from the .json")
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    path = ROOT / "docs" / "bench-training.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for task in given.tasks.split(","):
        TASKS[task] = replace(TASKS[task], activations="exact")
        for method in given.methods.split(","):
            before = found.get(f"{task} {method}", {}) if given.keep_times else {}
            times = {name: before[name] for name in ("program_ms", "eager_ms", "peak_mib") if name in before}
            found[f"{task} {method}"] = measured(task, method, given.rows, times)
            print(found[f"{task} {method}"], file=sys.stderr)
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    machine = detect_environment()
    lines = [
        "# Training programs",
        "",
        f"Made by `python benchmarks/bench_training.py` on {machine.cpu}, {THREADS} threads; batches of {given.rows} "
        "rows; "
        f"losses of {STEPS} steps compared with eager SGD, momentum {MOMENTUM}, learning rate "
        f"{', '.join(f'{rate:g} for {task}' for task, rate in LEARNING_RATES.items())}.",
        "",
        *table(list(found.values())),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    path.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
