"""The ledger: everything that a run measured, step by step, written as JSON and shown by the report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.one_line import Entry
from edgetune.core.parity import Parity
from edgetune.core.widths import BitWidths


class Metric(NamedTuple):
    """The name of a quality metric, and whether higher is better."""

    noun: str
    unit: str
    higher_is_better: bool
    short: str  # the noun where there is little room


MetricName = Literal["accuracy_pct", "perplexity", "rmse", "entity_f1_pct"]
METRICS: Mapping[MetricName, Metric] = {
    "accuracy_pct": Metric("accuracy", "%", True, "acc."),
    "perplexity": Metric("perplexity", "", False, "perpl."),
    "rmse": Metric("RMSE", "", False, "RMSE"),
    "entity_f1_pct": Metric("entity F1", "%", True, "F1"),
}


class Quality(Entry):
    """One number on the held-out test set."""

    metric: MetricName
    value: float
    rows: int

    @property
    def higher_is_better(self) -> bool:
        """Accuracy rises, perplexity falls."""
        return METRICS[self.metric].higher_is_better

    @property
    def interval_pct(self) -> tuple[float, float] | None:
        """95 % interval of an accuracy measured on so many rows (Wilson's score interval); else `None`.

        >>> [round(end, 1) for end in Quality(metric="accuracy_pct", value=90.0, rows=20).interval_pct]
        [69.9, 97.2]
        """
        if self.metric != "accuracy_pct" or not self.rows or not math.isfinite(self.value):
            return None
        share, z2 = self.value / 100, 1.959964**2
        middle = (share + z2 / (2 * self.rows)) / (1 + z2 / self.rows)
        spread = math.sqrt(share * (1 - share) * z2 / self.rows + z2**2 / (4 * self.rows**2)) / (1 + z2 / self.rows)
        return 100 * max(0.0, middle - spread), 100 * min(1.0, middle + spread)


class Shift(Entry):
    """How far the predictions of a rounded model are from those that it gave before, on the test set."""

    kl_divergence: float  # of the distributions over classes or tokens, mean, in nats
    changed_pct: float  # of the predictions: another class or token is the most likely
    predictions: int  # that were compared: rows, or tokens


class Row(Entry):
    """The model after one step. `None`: not measured, with the reason in `note`."""

    index: int  # 0 is the model as loaded
    step: str  # recipe name of the step, "load" or "finalize"
    detail: str = ""  # the settings in a few words
    quality: Quality | None = None
    parameters: int
    trainable_parameters: int
    size_mib: float  # parameters and buffers, as stored in memory
    macs: int | None = None  # of one example
    saved_for_backward_mib: float | None = None  # tensors that autograd saves in one training batch
    seconds: float  # the step itself, without measuring; of a resumed training, all its parts together
    note: str = ""
    measured_at: str = ""  # UTC, ISO 8601
    digest: str = ""  # of the settings of this step and all before it
    shift: Shift | None = None  # of a step that rounds the weights
    widths: BitWidths | None = None  # of a step that gives layers different precisions


class LossPoint(Entry):
    """One optimizer update."""

    update: int
    loss: float
    learning_rate: float


class Training(Entry):
    """One `train` step."""

    row: int  # index of its row
    losses: tuple[LossPoint, ...]
    optimizer_state_mib: float
    gradients_mib: float
    peak_memory_mib: float | None = None  # weights, gradients, optimizer state, saved activations, teacher


class UndelegatedOperator(Entry):
    """An operator that the backend did not take."""

    operator: str
    module: str
    count: int


class Program(Entry):
    """The exported program, as in its `model.json`."""

    path: str
    target: str
    size_mib: float
    plan_kib: float  # planned arena for activations
    sha256: str
    delegated_macs_pct: float
    delegated_operators_pct: float
    undelegated: tuple[UndelegatedOperator, ...] = ()
    parity: Parity | None = None


class CallCost(Entry):
    """The cost of one kind of call of a program on one device."""

    device: str
    call: str = ""  # of a text-generation program: one token, or a piece of a prompt; else there is one kind

    @property
    def where(self) -> str:
        """Device and call: `this host, a token after 128`."""
        return f"{self.device}, {self.call}" if self.call else self.device


def on_cpu(threads: int | None) -> str:
    """`CPU, 6 threads`; the number only if it is known.

    >>> on_cpu(1), on_cpu(None)
    ('CPU, 1 thread', 'CPU')
    """
    return "CPU" if threads is None else f"CPU, {threads} thread{'s' * (threads != 1)}"


NO_MODULE = "(no module)"  # of operators that belong to none


class Measured(CallCost):
    """Timed on a real machine."""

    latency_ms: float  # median
    latency_p10_ms: float
    latency_p90_ms: float
    load_ms: float
    peak_memory_mib: float  # of the process, above an empty one
    runs: int
    threads: int
    note: str = ""
    first_ms: float | None = None  # the first run, with everything cold
    noise_pct: float | None = None  # the median is known to about this much, either way
    drift_pct: float | None = None  # the last third of the runs against the first
    cores: tuple[int, ...] = ()  # that the process was pinned to; empty: the system cannot pin
    energy_mj: float | None = None  # of one run, all that the meter covers; None: nothing there measures it
    energy_note: str = ""  # the meter, or why there is none
    temperature_c: tuple[float, float] | None = None  # of the hottest sensor, before and after the runs
    clock_mhz: tuple[float, float] | None = None  # of the fastest core, before, and the lowest after any batch
    layers_ms: dict[str, float] = Field(default_factory=dict)  # by module, "" for none; empty: not measured by layer


class Predicted(CallCost):
    """Computed from a device descriptor, for its CPU; the interval is as wide as the descriptor's trust demands."""

    name: str = ""  # of the device, as its maker writes it
    threads: int | None = None  # that the prediction is for
    accelerators: tuple[str, ...] | None = None  # kinds that the device has beside its CPU: "gpu"; none is predicted
    latency_ms: float
    latency_low_ms: float
    latency_high_ms: float
    peak_memory_mib: float
    calibrated: bool
    note: str = ""
    interval_pct: float | None = None  # target coverage of the interval in percent; None: not estimated
    energy_mj: float | None = None  # of one run; an order of magnitude
    cold_start_ms: float | None = None  # load, pack and run once

    @property
    def runs_on(self) -> str:
        """What the prediction is for: `CPU, 6 threads`."""
        return on_cpu(self.threads)

    @property
    def not_predicted(self) -> str:
        """What else the device could run it on: `GPU: not predicted`; empty where there is nothing."""
        kinds = ", ".join(kind.upper() for kind in dict.fromkeys(self.accelerators or ()))
        return f"{kinds}: not predicted" if kinds else ""


class Layer(Entry):
    """One module of a program on one device, predicted, its operators summed."""

    module: str
    operators: int
    ms: float
    share_pct: float  # of the time of one run
    bound: Literal["compute", "memory", "overhead"]  # of the operators that take most of its time
    utilization_pct: float  # of the rate that bounds it
    macs: int
    moved_bytes: int  # as stored: 8-bit operands are a quarter of the bytes
    dtype: str  # of most of its time

    @property
    def intensity(self) -> float:
        """Multiply-accumulates for each byte moved."""
        return self.macs / self.moved_bytes if self.moved_bytes else 0.0

    @property
    def gmacs(self) -> float:
        """Billion multiply-accumulates per second that it reaches."""
        return self.macs / (self.ms * 1e6) if self.ms else 0.0


class Roof(Entry):
    """The limits of the device for every layer, in multiply-accumulates."""

    memory_gb_s: float
    cache_gb_s: float  # of what stays in the last cache
    gmacs: dict[str, float]  # flat, by type


class Layers(CallCost):
    """One kind of call on one device: its layers, the slowest first, and the rest."""

    latency_ms: float  # their sum
    layers: tuple[Layer, ...]
    other: Layer | None  # all other operators together
    calls_ms: float  # of calling the program and its delegates
    bounds_pct: dict[Literal["compute", "memory", "overhead"], float]  # share of the time, the calls among the overhead
    roof: Roof


class Verdict(Entry):
    """One limit of the recipe's budget."""

    device: str
    quantity: Literal["latency_ms", "size_mib", "train_memory_mib", "peak_memory_mib"]
    limit: float
    value: float  # the run's result
    least: float  # the lowest value that this run shows to be reachable
    holds: bool
    note: str = ""


class Baseline(Entry):
    """A simple method on the same test set."""

    name: str
    value: float


class ClassFigures(Entry):
    """One class of a classifier, counted on the test set."""

    name: str
    rows: int  # that are of this class
    predicted: int  # that the model predicts as it
    right: int  # both

    @property
    def precision_pct(self) -> float | None:
        """Of the rows predicted as this class, those that are; `None` if none is."""
        return 100 * self.right / self.predicted if self.predicted else None

    @property
    def recall_pct(self) -> float | None:
        """Of the rows of this class, those predicted as it; `None` if there are none."""
        return 100 * self.right / self.rows if self.rows else None


class Confusion(Entry):
    """Rows of one class that the model predicts as another."""

    true: str
    predicted: str
    rows: int


class Mistake(Entry):
    """A row that the model predicts as another class, with that class's share of all scores."""

    row: int  # of the test set, from 0
    text: str = ""  # the text, truncated, or the name of an image's file
    image: str = ""  # a small image as a data: URI
    true: str
    predicted: str
    confidence_pct: float


class Answers(Entry):
    """A classifier's predictions on the test set, counted by class."""

    classes: tuple[ClassFigures, ...]  # in the model's order
    confusions: tuple[Confusion, ...] = ()  # the most frequent first; the rarest are left out of a long list
    mistakes: tuple[Mistake, ...] = ()  # the most confident ones

    @property
    def quality(self) -> Quality:
        """The accuracy over all rows."""
        rows = sum(one.rows for one in self.classes)
        right = sum(one.right for one in self.classes)
        return Quality(metric="accuracy_pct", value=100 * right / rows if rows else math.nan, rows=rows)


class Ledger(Entry):
    """A whole run."""

    format: Literal[2] = 2
    recipe: str  # name
    seed: int
    model: str
    data: str
    settings: dict[str, Any]  # the resolved recipe
    environment: dict[str, str]
    baselines: tuple[Baseline, ...] = ()
    rows: tuple[Row, ...] = ()
    trainings: tuple[Training, ...] = ()
    answers: Answers | None = None  # of the final model; None: a language model
    program: Program | None = None
    measured: tuple[Measured, ...] = ()
    predicted: tuple[Predicted, ...] = ()
    unquantized: tuple[Predicted, ...] = ()  # the same model before it was quantized
    layers: tuple[Layers, ...] = ()  # of each prediction
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()  # for the reader, about the data and the model
    finished: bool = False

    def with_(self, **changes: Any) -> Ledger:
        """A copy with these fields replaced."""
        return self.model_copy(update=changes)

    def dumps(self) -> str:
        """As indented JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=1)

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """Read `ledger.json`. Raises `EdgetuneError` (exit code 3) if it is not a ledger of this format."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is damaged, or of another version"
            problem = f"{path} cannot be read as a ledger: {reason}"
            raise EdgetuneError(problem, action="run the recipe again", exit_code=Exit.DATA) from error


THIS_HOST = "this host"
