"""A prior for devices that were never calibrated, learned from published measurements of other devices.

    log(time published / time predicted) = a[kind of program, engine, app of others or not] + b[family] + c[type]

Each term is the mean over devices of the residuals of the terms before it. A device counts once however many rows it
has, and all terms but the first are shrunk towards zero while few devices have data for them. A regression would fit
the devices, some ten for a kind of program. Tried on left-out devices and rejected: one thread or many as a term
(fewer large errors, more of 40 %), the core's pipeline (in order or not) in place of the family, dot products, and the
model's size.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from statistics import median

from edgetune.core.files import write_atomically
from edgetune.profile.device import Device
from edgetune.profile.facts import StrictRecord
from edgetune.program.operators import DType, Operator

FILE = "prior.json"
COVERAGE = 0.8  # target coverage of left-out rows by the prediction interval
SIGMAS = 1.2816  # half width of that interval for a normal error
_DOUBTS = (0.0, 0.5, 1.0)  # pseudo-devices with a zero term, by level
_PULL = 2.0  # pseudo-devices with the width of the kind of program
_SPARE = 0.25  # of a device, added so that left-out rows are covered as often as claimed
_LEAST = 0.10  # least half width: two labs that measured one phone differ by more
_NOTHING = 0.7  # with data of fewer than two devices: a factor of two
_PRECISION: dict[DType, str] = {
    "fp32": "fp32", "fp16": "16-bit", "bf16": "16-bit", "int8": "int8", "8da4w": "4-bit",
}  # fmt: skip

Keys = tuple[str, str, str]  # from the widest term to the narrowest


@dataclass(frozen=True)
class Seen:
    """One published row: its device, its terms, and how much slower than predicted it is."""

    device: str
    keys: Keys
    log: float


class Prior(StrictRecord):
    """The terms, and the width of the prediction interval around their sum, as logarithms of times."""

    offsets: dict[str, float]
    widths: dict[str, float]  # half the interval that covers `COVERAGE`, by the first and by the second key

    def offset_and_width(self, keys: Keys) -> tuple[float, float]:
        """The sum of the terms for these keys, and half the width of its interval."""
        width = self.widths.get(keys[1], self.widths.get(keys[0], _NOTHING))
        return sum(self.offsets.get(key, 0.0) for key in keys), width

    def has_data_for(self, keys: Keys) -> bool:
        """Whether any device has data for this kind of program."""
        return keys[0] in self.offsets

    def offset(self, device: Device, group: str) -> tuple[float, float]:
        """Natural logarithm to add to a predicted time, and its standard deviation. `group`: of `group_of`."""
        keys = keys_of(group, device, "shell")
        log, width = self.offset_and_width(keys if self.has_data_for(keys) else keys_of(group, device, "app"))
        return log, width / SIGMAS


def group_of(operators: Sequence[Operator]) -> str:
    """The kind of program, by most of its multiplications: `vision int8`, `decode 4-bit`, `prefill fp32`."""
    most = max(operators, key=lambda operator: operator.macs)
    work: dict[tuple[str, str], int] = defaultdict(int)
    for operator in operators:
        if operator.kind in ("conv", "pointwise-conv", "depthwise-conv"):
            kind = "vision"
        else:
            rows = math.prod(operator.output_shape[:-1])
            kind = "decode" if rows <= 1 else "prefill"
        work[kind, _PRECISION[operator.dtype]] += operator.macs
    kind, precision = max(work, key=lambda key: work[key]) if most.macs else ("vision", _PRECISION[most.dtype])
    return f"{kind} {precision}"


def keys_of(group: str, device: Device, setting: str, engine: str = "XNNPACK") -> Keys:
    """The terms of a program of that group on the device.

    iPhones are fitted separately, except in apps of others: all their other rows come from the engine's own apps, and
    one phone's figures are off by up to a factor of twenty.
    """
    kind, _, precision = group.partition(" ")
    first = kind if "XNNPACK" in engine else f"{engine} {kind}"
    apple = device.family == "phone" and "coreml" in device.targets
    if setting == "app":
        first = f"{first} in an app"
    elif apple:
        first = f"{first} on Apple"
    second = f"{first}, {'apple' if apple else device.family}"
    return first, second, f"{second}, {precision}"


def fit_offsets(rows: Sequence[Seen]) -> dict[str, float]:
    """The terms."""
    left = [row.log for row in rows]
    offsets: dict[str, float] = {}
    for level, doubt in enumerate(_DOUBTS):
        by_key: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row, log in zip(rows, left, strict=True):
            by_key[row.keys[level]][row.device].append(log)
        for key, devices in by_key.items():
            # The first term is not shrunk: the predictor's constants then cancel, even if they were once set by rows of
            # the device that is left out.
            offsets[key] = sum(median(logs) for logs in devices.values()) / (len(devices) + doubt)
        left = [log - offsets[row.keys[level]] for row, log in zip(rows, left, strict=True)]
    return offsets


def fit_widths(rows: Sequence[Seen]) -> dict[str, float]:
    """Half the interval by first and second key: the quantile of the errors on each device when it, too, is left out.

    The width of a class is shrunk towards that of its kind of program, for which more devices have data.
    """
    missed: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    classes: dict[str, str] = {}
    for device in sorted({row.device for row in rows}):
        offsets = fit_offsets([row for row in rows if row.device != device])
        for row in rows:
            if row.device == device:
                error = abs(row.log - sum(offsets.get(key, 0.0) for key in row.keys))
                classes[row.keys[1]] = row.keys[0]
                for key in row.keys[:2]:
                    missed[key][device].append(error)
    half_widths = {kind: max(_LEAST, _quantile(missed[kind])) for kind in classes.values() if len(missed[kind]) > 1}
    for key, kind in classes.items():
        if kind in half_widths:
            devices = len(missed[key])
            own = _quantile(missed[key])
            half_widths[key] = max(_LEAST, (devices * own + _PULL * half_widths[kind]) / (devices + _PULL))
    return half_widths


def _quantile(devices: dict[str, list[float]]) -> float:
    """The quantile at `COVERAGE`, with equal weight for every device."""
    errors = sorted((error, 1 / len(own)) for own in devices.values() for error in own)
    wanted, reached = min(COVERAGE * (len(devices) + _SPARE), len(devices)) - 1e-9, 0.0
    for error, weight in errors:
        reached += weight
        if reached >= wanted:
            return error
    return errors[-1][0]


def trust(rows: Sequence[Seen], offsets: dict[str, float]) -> dict[str, float]:
    """By first and second key, the part of one row's error that the device's other rows share, from 0 to 1.

    This is the variance of the residuals between devices, over that between and within devices.
    """
    left: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        error = row.log - sum(offsets.get(key, 0.0) for key in row.keys)
        for key in row.keys[:2]:
            left[key][row.device].append(error)
    return {key: _between(devices) for key, devices in left.items() if len(devices) > 1}


def _between(devices: dict[str, list[float]]) -> float:
    middles = {device: median(errors) for device, errors in devices.items()}
    within = [(error - middles[device]) ** 2 for device, errors in devices.items() for error in errors]
    outside, inside = sum(middle**2 for middle in middles.values()) / len(middles), sum(within) / len(within)
    return outside / (outside + inside) if outside + inside > 0 else 0.5


def fit_prior(rows: Sequence[Seen]) -> Prior:
    """Terms and widths from all rows."""
    return Prior(offsets=fit_offsets(rows), widths=fit_widths(rows))


@cache
def load_prior() -> Prior:
    """The prior from every published row, as shipped. `python -m edgetune.profile.validate FILE` writes it anew."""
    text = (resources.files("edgetune.devices") / FILE).read_text(encoding="utf-8")
    return Prior.model_validate(json.loads(text))


def write(prior: Prior, path: Path) -> None:
    """Write it as JSON, rounded so that a fit on another machine gives the same file."""
    plain = {name: {key: round(value, 4) for key, value in sorted(terms.items())} for name, terms in prior}
    write_atomically(path, json.dumps(plain, indent=1) + "\n")
