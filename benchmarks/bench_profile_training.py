"""Schemes of the sparse-update benchmark: time and memory of a step predicted from a look at the model, and measured.

`bench_profile_training.py TASK THREADS` prints JSON rows, one for each method. The prediction is that of
`SparseUpdate(scheme="auto")`: some forwards and a few steps that train a part of every layer, of another scheme. In
each round the model is looked at and every method's steps are timed; of the looks and of each method the fastest
counts, as the machine is shared. `ENVIRONMENT` must be set: the C library else returns memory and takes it anew, a page
at a time, which makes a step up to half as long again, or not, from one process to the next.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import torch
from bench_sparse_worker import MIB, TASKS, Worker

from edgetune.core.apply import finalize
from edgetune.sparse.auto.account import CostModel
from edgetune.sparse.update import SparseUpdate

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("full with lean", "last-1", "last-2", "bias", "auto")
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
ROUNDS, STEPS = 3, 7


def main(task: str, threads: int) -> None:
    """In each round look at the model, and time each method."""
    torch.set_num_threads(threads)
    out, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    scheme = json.loads((ROOT / "docs" / f"bench-sparse-{task}.json").read_text(encoding="utf-8"))["scheme"]
    looked = Worker(task, "last-1")
    model = finalize(looked.model).requires_grad_(True)
    head, kept = TASKS[task].head, TASKS[task].activations  # how `auto` keeps them there

    def look(technique: SparseUpdate) -> CostModel:
        return CostModel.of(model, looked.batches[0], looked.loss, technique.under(model))

    workers = {method: Worker(task, method, scheme=scheme) for method in METHODS}
    exact, own = [], []
    times: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    for _ in range(ROUNDS):
        exact.append(look(SparseUpdate(head=head)))
        own.append(exact[-1] if kept == "exact" else look(SparseUpdate(head=head, activations=kept)))
        for method, worker in workers.items():
            worker.step()
            times[method].append([worker.step() for _ in range(STEPS)])
    found = []
    for method, worker in workers.items():
        settings = {"full with lean": {"scheme": {"*": "full"}}, "auto": {"scheme": scheme, "head": "frozen"}}
        technique = SparseUpdate(**{"scheme": method, "head": head, **settings.get(method, {})})
        resolved = technique.resolve(model)
        profiles = own if method == "auto" else exact
        found.append({
            "task": task, "method": method, "predicted_ms": min(profile.step_ms(resolved) for profile in profiles),
            "measured_ms": min(map(statistics.median, times[method])), "all_ms": times[method],
            "predicted_saved_mib": profiles[0].account(resolved).saved_bytes / MIB,
            "measured_saved_mib": worker.memory()["saved_mib"],
        })  # fmt: skip
    print(json.dumps(found), file=out)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
