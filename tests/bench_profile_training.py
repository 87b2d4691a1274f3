"""Schemes of the sparse-update benchmark: time and memory of a step predicted from a look at the model, and measured.

`python tests/bench_profile_training.py TASK` prints JSON rows, one for each method. The prediction is that of
`SparseUpdate(scheme="auto")`: some forwards and a few steps that train a part of every layer, of another scheme.
Each method is then prepared anew, and its steps are timed.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import torch
from bench_sparse_worker import MIB, TASKS, Worker

from edgetune.attach import finalize
from edgetune.sparse.auto.account import Profile
from edgetune.sparse.update import SparseUpdate

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("full-light", "last-1", "last-2", "bias", "auto")
WARM_UP, STEPS = 2, 7


def main(task: str) -> None:
    """Predict all methods from one look, then measure each."""
    torch.set_num_threads(2)
    out, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    scheme = json.loads((ROOT / "docs" / f"bench-sparse-{task}.json").read_text(encoding="utf-8"))["scheme"]
    looked = Worker(task, "last-1")
    model = finalize(looked.model).requires_grad_(True)
    head, kept = TASKS[task].head, TASKS[task].activations  # how `auto` keeps them there

    def look(technique: SparseUpdate) -> Profile:
        return Profile.of(model, looked.batches[0], looked.loss, technique)

    exact = look(SparseUpdate(head=head))
    own = exact if kept == "exact" else look(SparseUpdate(head=head, activations=kept))
    found = []
    for method in METHODS:
        profile = own if method == "auto" else exact
        settings = {"full-light": {"scheme": {"*": "full"}}, "auto": {"scheme": scheme, "head": "frozen"}}
        technique = SparseUpdate(**{"scheme": method, "head": head, **settings.get(method, {})})
        resolved = technique.resolve(model)
        worker = Worker(task, method, scheme=scheme)
        for _ in range(WARM_UP):
            worker.step()
        times = [worker.step() for _ in range(STEPS)]
        found.append({
            "task": task, "method": method, "predicted_ms": profile.step_ms(resolved),
            "measured_ms": statistics.median(times), "all_ms": times,
            "predicted_kept_mib": profile.account(resolved).kept_bytes / MIB,
            "measured_kept_mib": worker.memory()["kept_mib"],
        })  # fmt: skip
    print(json.dumps(found), file=out)


if __name__ == "__main__":
    main(sys.argv[1])
