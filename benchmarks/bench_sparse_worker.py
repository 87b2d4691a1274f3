"""One way to fine-tune one model, alone in its process, doing what it is told line by line; see bench_sparse.py.

python benchmarks/bench_sparse_worker.py TASK METHOD [SCHEME]   commands on stdin, one JSON value a line on stdout
python benchmarks/bench_sparse_worker.py TASK choose STEP_MS    the scheme of `auto`, as JSON, which SCHEME then is
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edgetune.adapt.lora import LoRA
from edgetune.core.apply import apply, finalize
from edgetune.core.inputs import Inputs, call, logits_of
from edgetune.core.registry import DATASETS, MODELS, loader
from edgetune.core.technique import Sample
from edgetune.data.dataset import Split
from edgetune.data.settings import DataSettings
from edgetune.lean.operators import Activations
from edgetune.lean.saved import saved_bytes
from edgetune.lean.technique import Lean
from edgetune.models.loaded import ModelSettings
from edgetune.sparse.auto import choose as auto
from edgetune.sparse.auto.account import OptimizerSpec
from edgetune.sparse.scheme import Slice
from edgetune.sparse.update import SparseUpdate
from edgetune.tasks.quality import quality
from edgetune.train import optimizer as optimizers
from edgetune.train.loop import seed_everything, train
from edgetune.train.settings import Train

MIB = 2**20
WITH_LEAN = " with lean"  # ends the name of a method that has the lean operators beside


@dataclass(frozen=True)
class Task:
    """A model and its data, as the issue of sparse backpropagation names them."""

    model: ModelSettings
    data: DataSettings
    batch_size: int
    tokens: int | None  # each timed batch is padded to so many
    lora: tuple[str, ...]  # every linear; for a convolutional net every convolution without groups too
    head: Any  # what the named schemes do with the layers after the last block
    budget_mib: float  # of `auto`: all of training, as the ledger counts it
    updates: int
    activations: Activations = "exact"  # of `auto`: whether it keeps them whole or in 8 bits
    epoch_rows: int = 512
    methods: tuple[str, ...] = ("full", "full with lean", "lora", "lora with lean", "last-1", "last-2", "bias", "auto")
    rates: dict[str, float] = field(default_factory=dict)  # learning rates, usual ones for each method; not tuned


TASKS = {
    "minilm": Task(
        model=ModelSettings(source="minilm", max_length=64),
        data=DataSettings(source="tweets"),
        batch_size=32, tokens=64, lora=("*.query", "*.key", "*.value", "*.dense"), head="full",
        budget_mib=180, activations="8bit", updates=228,
        rates={"full": 2e-4, "lora": 1e-3, "last-1": 5e-4, "last-2": 5e-4, "bias": 2e-3, "auto": 1e-3},
    ),
    "effnet-lite0": Task(
        model=ModelSettings(source="effnet-lite0", image_px=112),
        data=DataSettings(source="fashion-mnist", train_rows=6000, validation_rows=500, test_rows=2000),
        batch_size=32, tokens=None, lora=("*._expand_conv", "*._project_conv", "_conv_head", "_fc"), head="full",
        budget_mib=100, updates=375,
        rates={"full": 1e-3, "lora": 2e-3, "last-1": 2e-3, "last-2": 2e-3, "bias": 5e-3, "auto": 2e-3},
    ),
    "smollm2": Task(
        model=ModelSettings(source="smollm2", max_length=256),
        data=DataSettings(source="conversations"),
        batch_size=4, tokens=256, lora=("*.?_proj", "*.gate_proj", "*.up_proj", "*.down_proj"), head="frozen",
        budget_mib=920, updates=120, epoch_rows=64,
        methods=("full", "full with lean", "lora", "lora with lean", "last-1", "last-2", "auto"),  # has no biases
        rates={"full": 1e-4, "lora": 1e-3, "last-1": 1e-3, "last-2": 1e-3, "auto": 7e-4},
    ),
}  # fmt: skip


class Worker:
    """A model made ready by one method; each command is a method of this class."""

    def __init__(self, task: str, method: str, seed: int = 0, scheme: dict[str, Any] | None = None) -> None:
        self.task, self.method, self.scheme = TASKS[task], method, scheme
        self.dataset = loader(DATASETS, "data", self.task.data.source)(self.task.data)
        seed_everything(seed)
        loaded = loader(MODELS, "model", self.task.model.source)(self.task.model, self.dataset)
        self.train_split = Split(self.dataset.task, self.dataset.train, loaded.encode)
        self.test_split = Split(self.dataset.task, self.dataset.test, loaded.encode)
        self.validation_split = Split(self.dataset.task, self.dataset.validation, loaded.encode)
        self.batches = [self.batch(4 + n) for n in range(4)]
        self.model = prepared(method, loaded.model, self)
        self.model.train()
        light = method.startswith("auto")
        self.settings = Train(
            updates=self.task.updates, batch_size=self.task.batch_size, clip_norm=None if light else 1.0,
            in_backward=light, learning_rate=self.task.rates[method.removesuffix(WITH_LEAN)],
        )  # fmt: skip
        self.optimizer = optimizers.build(self.settings, [p for p in self.model.parameters() if p.requires_grad])
        self.ready_rss = resident_bytes()
        self.steps = 0

    def batch(self, number: int) -> tuple[Inputs, Tensor]:
        """A training batch, every row padded to the task's number of tokens."""
        rows = range(number * self.task.batch_size, (number + 1) * self.task.batch_size)
        return (
            self.train_split.batch(rows, pad_to=self.task.tokens) if self.task.tokens else self.train_split.batch(rows)
        )

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The task's loss; `full` and `lora` have PyTorch's own."""
        return self.dataset.task.loss(logits, labels)

    def sample(self) -> Sample:
        """What `auto` may look at: training rows."""
        batches = [self.batch(n) for n in range(4)]
        return Sample(batches[0][0], lambda: iter([b for b, _ in batches]), lambda: iter(batches), self.loss)

    def step(self) -> float:
        """Milliseconds of one step: forward, backward, update."""
        inputs, labels = self.batches[self.steps % len(self.batches)]
        self.steps += 1
        begun = time.perf_counter()
        inside = optimizers.stepping_in_backward(self.optimizer) if self.settings.in_backward else nullcontext()
        with inside:
            self.loss(logits_of(call(self.model, inputs)), labels).backward()
        optimizers.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        return 1e3 * (time.perf_counter() - begun)

    def forward(self) -> float:
        """Milliseconds of one forward in training mode without a graph."""
        inputs, _ = self.batches[0]
        begun = time.perf_counter()
        with torch.no_grad():
            call(self.model, inputs)
        return 1e3 * (time.perf_counter() - begun)

    def memory(self) -> dict[str, float]:
        """After some steps. The process's peak is counted from where model and data were there."""
        inputs, labels = self.batches[0]
        return {
            "process_mib": (peak_bytes() - self.ready_rss) / MIB,
            "optimizer_mib": optimizers.state_bytes(self.optimizer) / MIB,
            "saved_mib": saved_bytes(self.model, inputs, lambda y: self.loss(logits_of(y), labels)) / MIB,
            "trainable": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "backward_operators": self.backward_operators(),
        }

    def backward_operators(self) -> int:
        """ATen operators that backward runs."""
        inputs, labels = self.batches[0]
        loss = self.loss(logits_of(call(self.model, inputs)), labels)
        with _Counter() as counter:
            loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        return counter.count

    def quality(self, seed: int, threads: int = 2, split: str = "test", **changes: Any) -> dict[str, float]:
        """Train anew with this seed; the split's quality."""
        torch.set_num_threads(threads)
        fresh = Worker(self.name, self.method, seed, self.scheme)
        settings = fresh.settings.model_copy(update=changes)
        begun = time.perf_counter()
        train(fresh.model, settings, fresh.train_split, fresh.loss, seed=seed)
        seconds = time.perf_counter() - begun
        chosen = fresh.test_split if split == "test" else fresh.validation_split
        found = quality(fresh.model, chosen)
        return {"value": found.value, "rows": found.rows, "seconds": seconds}

    def epoch(self, cached: bool = False) -> float:
        """Seconds of an epoch over `epoch_rows`, or of the second one with a cached prefix; trains the model."""
        rows = self.train_split.rows.subset(range(self.task.epoch_rows))
        split = Split(self.dataset.task, rows, self.train_split.encode)
        ended: list[float] = []
        changes = {"updates": None, "epochs": 2 if cached else 1, "cache_prefix": cached}
        settings = Train(**{**self.settings.model_dump(), **changes})
        with tempfile.TemporaryDirectory() as folder:
            train(self.model, settings, split, self.loss, seed=0, prefixes=Path(folder),
                  progress=lambda *_: ended.append(time.perf_counter()))  # fmt: skip
        self.model.train()
        each = len(ended) // (2 if cached else 1)
        return (ended[-1] - ended[-each]) * each / (each - 1)  # from the end of the epoch's first update

    @property
    def name(self) -> str:
        """The key in TASKS."""
        return next(name for name, task in TASKS.items() if task is self.task)


class _Counter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def prepared(method: str, model: nn.Module, worker: Worker) -> nn.Module:
    """The model as this method trains it."""
    task = worker.task
    lean = [Lean()] if method.endswith(WITH_LEAN) else []
    if method.startswith("full"):
        return apply(model.requires_grad_(True), lean)
    if method.startswith("lora"):
        heads = ("classifier",) if task.model.source == "minilm" else ()
        return apply(model, [*lean, LoRA(rank=8, targets=task.lora, skip=(), also_train=heads)])
    if method == "auto":
        assert worker.scheme is not None
        return apply(
            model, SparseUpdate(scheme=worker.scheme, head="frozen", activations=task.activations), worker.sample()
        )
    return apply(model, SparseUpdate(scheme=method, head=task.head))


def choose(worker: Worker, step_ms: float) -> dict[str, Any]:
    """The scheme, written out, for the budget of the task and this time of a step, with what is predicted of it."""
    task, model = worker.task, finalize(worker.model).requires_grad_(True)
    technique = SparseUpdate(head=task.head, activations=task.activations)
    spec = OptimizerSpec(in_backward=True)
    found = auto.choose(model, worker.sample(), task.budget_mib, step_ms, under=technique.under(model),
        head=task.head, optimizer=spec)  # fmt: skip
    print(found, file=sys.stderr)
    written = found.scheme.to_mapping()
    return {
        "scheme": {n: part.model_dump() if isinstance(part, Slice) else part for n, part in written.items()},
        "predicted": {"step_ms": found.step_ms, "saved_mib": found.account.saved_bytes / MIB},
    }


def resident_bytes() -> int:
    """What the process holds now."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """The most the process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Answer commands until stdin ends: `["step"]`, `["quality", 1]`."""
    torch.set_num_threads(2)
    out, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    if sys.argv[2] == "choose":  # a process of its own: looking at a model takes memory that training does not
        print(json.dumps(choose(Worker(sys.argv[1], "last-1"), float(sys.argv[3]))), file=out)
        return
    worker = Worker(*sys.argv[1:3], scheme=json.loads(sys.argv[3]) if len(sys.argv) > 3 else None)
    print(json.dumps("ready"), file=out, flush=True)
    for line in sys.stdin:
        name, *args = json.loads(line)
        command: Callable[..., Any] = getattr(worker, name)
        print(json.dumps(command(*args)), file=out, flush=True)


if __name__ == "__main__":
    main()
