"""Sparse backpropagation beside full fine-tuning and LoRA: time, memory and quality, in one run.

    python benchmarks/bench_sparse.py [--tasks minilm,effnet-lite0,smollm2] [--rounds 7] [--seeds 3]

Each method has a process of its own, which is what its memory is read from; timed steps are taken in turn, one step of
each method after the other, so that what else the machine does falls on all alike. `auto` is given the time that
HELD_TO leaves it, by some steps of full fine-tuning and LoRA that are timed first; all of its figures are those of the
one scheme that it then chooses, which stands in the .json. `full with lean` and `lora with lean` train the same by the
operators of `lean`, which sparse-update uses too: beside `full with lean`, steps are compared on like kernels. Quality
is that of the test set after as many updates for every method, at the learning rates of bench_sparse_worker.TASKS,
which were chosen on validation rows.
Writes docs/bench-sparse-<task>.md and .json; qualities that a .json holds already are taken from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_sparse_worker import TASKS, WITH_LEAN

from edgetune.run.environment import environment

ROOT = Path(__file__).resolve().parents[1]
WORKER = [sys.executable, str(ROOT / "benchmarks" / "bench_sparse_worker.py")]
EPOCHS = 3  # timed, of full fine-tuning and of each method that can start behind a cached prefix
EPOCH_SHARE = 0.2  # of a full epoch that a later one may take with a cached prefix
TIME_SHARE = 0.85  # of the time that HELD_TO leaves a step, which auto is given: the rest is for noise
HELD_TO = {  # of auto, against another method
    ("saved_mib", "full"): 8.0, ("saved_mib", "lora"): 5.6, ("step_ms", "full"): 2.5, ("step_ms", "lora"): 2.0,
}  # fmt: skip
LEAN_HELD_TO = {  # how many times less memory a method needs with lean; and at most this share of its time with lora
    "full": {"minilm": 2.2, "smollm2": 2.2}, "lora": {"minilm": 3.0, "smollm2": 3.0},
}  # fmt: skip
LEAN_TIME_SHARE = 1.05
FIGURES = {"saved_mib": ("memory saved for backward", "MiB"), "step_ms": ("step time", "ms")}  # on the page


class Process:
    """A worker, and what it answers."""

    def __init__(self, task: str, method: str, scheme: Any = None) -> None:
        command = [*WORKER, task, method, *([json.dumps(scheme)] if method == "auto" else [])]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer()

    def answer(self) -> Any:
        """The next line it writes."""
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise SystemExit(f"{self.child.args} ended with {self.child.wait()}")
        return json.loads(line)

    def ask(self, *command: Any) -> Any:
        """Send a command and wait for its answer."""
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(command) + "\n")
        self.child.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End it."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait()


def chosen(task: str, rounds: int) -> Any:
    """The scheme of `auto`, within the time that the others' steps leave it, less what noise may take."""
    workers = {method: Process(task, method) for method in ("full", "lora")}
    times = {method: [worker.ask("step") for _ in range(rounds)] for method, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    step_ms = TIME_SHARE * min(statistics.median(times[m][2:]) / HELD_TO["step_ms", m] for m in workers)
    print(f"{task}: {step_ms:.0f} ms for a step of auto", file=sys.stderr)
    return json.loads(subprocess.check_output([*WORKER, task, "choose", str(step_ms)], text=True))


def costs(task: str, rounds: int, scheme: Any) -> dict[str, dict[str, Any]]:
    """Step time and memory of every method."""
    workers = {method: Process(task, method, scheme) for method in TASKS[task].methods}
    times: dict[str, list[float]] = {method: [] for method in workers}
    for turn in range(rounds + 2):
        for method, worker in workers.items():
            taken = worker.ask("step")
            if turn >= 2:  # the first steps make the optimizer's state and warm the caches
                times[method].append(taken)
        print(f"{task}: round {turn + 1} of {rounds + 2}", file=sys.stderr)
    found = {
        method: {"step_ms": statistics.median(times[method]), "steps_ms": times[method], **worker.ask("memory")}
        for method, worker in workers.items()
    }
    cached = [method for method in workers if method.startswith("last-") or method == "auto"]
    epochs: dict[str, list[float]] = {method: [] for method in ("full", *cached)}
    for _ in range(EPOCHS):
        for method in epochs:
            epochs[method].append(workers[method].ask("epoch", method in cached))
            print(f"{task}: epoch of {method}: {epochs[method][-1]:.1f} s", file=sys.stderr)
    for method, taken in epochs.items():
        found[method]["epoch_s"] = statistics.median(taken)
    for worker in workers.values():
        worker.close()
    return found


def qualities(
    task: str, seeds: int, known: dict[str, list[Any]], save: Any, methods: tuple[str, ...], scheme: Any, threads: int
) -> dict[str, list[Any]]:
    """Quality on the test set after training, by method and seed; `save` is called after each."""
    for seed in range(seeds):
        for method in methods:
            if method.endswith(WITH_LEAN) or len(known.setdefault(method, [])) > seed:
                continue
            worker = Process(task, method, scheme)
            known[method].append(worker.ask("quality", seed, threads))
            worker.close()
            print(f"{task}: {method}, seed {seed}: {known[method][-1]}", file=sys.stderr)
            save()
    return known


def table(task: str, cost: dict[str, Any], quality: dict[str, list[Any]]) -> list[str]:
    """One row for each method."""
    unit = "perplexity" if task == "smollm2" else "accuracy, %"
    lines = [
        "| method | trains | step, ms | against full | against full with lean | saved for backward, MiB "
        "| against full | optimizer, MiB | process, MiB | operators in backward | later epoch, prefix cached "
        f"| {unit} |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    full, like = cost["full"], cost["full" + WITH_LEAN]
    for method, row in cost.items():
        values = [q["value"] for q in quality.get(method, [])]
        same = f"as {method.removesuffix(WITH_LEAN)}" if method.endswith(WITH_LEAN) else "not measured"
        shown = f"{statistics.mean(values):.2f}" if values else same
        if len(values) > 1:
            shown += f" ± {statistics.stdev(values):.2f} ({' / '.join(f'{v:.2f}' for v in values)})"
        cached = method != "full" and "epoch_s" in row
        epoch = f"{row['epoch_s'] / full['epoch_s']:.2f} of full's" if cached else ""
        lines.append(
            f"| {method} | {row['trainable']:,} | {row['step_ms']:,.0f} "
            f"| {full['step_ms'] / row['step_ms']:.2f} × less | {like['step_ms'] / row['step_ms']:.2f} × less "
            f"| {row['saved_mib']:,.1f} | {full['saved_mib'] / row['saved_mib']:.1f} × less "
            f"| {row['optimizer_mib']:,.1f} "
            f"| {row['process_mib']:,.0f} | {row['backward_operators']:,} | {epoch} | {shown} |"
        )
    return lines


def verdicts(task: str, cost: dict[str, Any], quality: dict[str, list[Any]]) -> list[str]:
    """What the method `auto` is held to, and whether it is reached."""
    lines = []
    for (figure, other), wanted in HELD_TO.items():
        ratio = cost[other][figure] / cost["auto"][figure]
        name = FIGURES[figure][0]
        lines.append(f"{'reached' if ratio >= wanted else 'MISSED'}: {name} {ratio:.2f} times less than {other} "
                     f"(goal: {wanted})")  # fmt: skip
    for method, goals in LEAN_HELD_TO.items():
        if task not in goals or method + WITH_LEAN not in cost:
            continue
        less, share = (cost[method][f] / cost[method + WITH_LEAN][f] for f in ("saved_mib", "step_ms"))
        lines.append(f"{'reached' if less >= goals[task] else 'MISSED'}: memory saved for backward {less:.2f} times "
                     f"less by {method} with lean than by {method} (goal: {goals[task]})")  # fmt: skip
        if method == "lora":
            lines.append(f"{'reached' if share >= 1 / LEAN_TIME_SHARE else 'MISSED'}: a step of lora with lean takes "
                         f"{1 / share:.2f} of the time of lora (goal: at most {LEAN_TIME_SHARE})")  # fmt: skip
    for method in ("last-1", "last-2", "auto"):
        if "epoch_s" in cost[method]:
            share = cost[method]["epoch_s"] / cost["full"]["epoch_s"]
            lines.append(f"{'reached' if share <= EPOCH_SHARE else 'MISSED'}: {method} with a cached prefix: later "
                         f"epochs take {share:.2f} of the time of a full epoch "
                         f"(goal: at most {EPOCH_SHARE})")  # fmt: skip
    if quality.get("auto") and quality.get("full"):
        ours, full = (statistics.mean(q["value"] for q in quality[m]) for m in ("auto", "full"))
        if task == "smollm2":
            lost, limit, unit = 100 * (ours / full - 1), 3.0, "%"
        else:
            lost, limit, unit = full - ours, 1.0, "points"
        lines.append(
            f"{'reached' if lost <= limit else 'MISSED'}: {lost:+.2f} {unit} compared with full (goal: at most {limit})"
        )
    return lines


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--rounds", type=int, default=7, help="0: times and memory as they were measured before")
    parser.add_argument("--seeds", type=int, default=3, help="0: no quality")
    parser.add_argument(
        "--threads", type=int, default=2, help="of each training for quality: 1 to run two tasks at once"
    )
    parser.add_argument("--keep-scheme", action="store_true", help="of auto, from the .json")
    parser.add_argument("--methods", default="", help="quality of these alone")
    given = parser.parse_args()
    missed = False
    for task in given.tasks.split(","):
        path = ROOT / "docs" / f"bench-sparse-{task}.json"
        held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        quality: dict[str, list[Any]] = held.setdefault("quality", {})

        def save(path: Path = path, held: dict[str, Any] = held) -> None:
            path.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")

        methods = tuple(given.methods.split(",")) if given.methods else TASKS[task].methods
        if given.rounds and not given.keep_scheme:
            found = chosen(task, given.rounds)
            if found["scheme"] != held.get("scheme"):
                quality.pop("auto", None)  # another scheme has another quality
            held |= found
            save()
        if given.rounds:
            held["cost"] = costs(task, given.rounds, held["scheme"])
            save()
        held["quality"] = qualities(task, given.seeds, quality, save, methods, held.get("scheme"), given.threads)
        save()
        if "cost" not in held:
            print(f"{task}: no step has been timed yet", file=sys.stderr)
            continue
        machine = environment()
        settings = TASKS[task]
        lines = [
            f"# `make bench-sparse`: {task}",
            "",
            f"Made by `python benchmarks/bench_sparse.py` on {machine.cpu}, {machine.cores} cores; batches of "
            f"{settings.batch_size}{f' x {settings.tokens} tokens' if settings.tokens else ''}; "
            f"{settings.updates} updates for quality. `auto` uses `activations: {settings.activations}`.",
            "",
            *table(task, held["cost"], quality),
            "",
            *(f"- {line}" for line in verdicts(task, held["cost"], quality)),
            *(
                f"- auto: {' ('.join(FIGURES[name])}), predicted {value:.1f}, measured {held['cost']['auto'][name]:.1f}"
                for name, value in held.get("predicted", {}).items()
            ),
        ]
        missed |= any("MISSED" in line for line in lines)
        text = "\n".join(lines) + "\n"
        print(text)
        path.with_suffix(".md").write_text(text, encoding="utf-8")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
