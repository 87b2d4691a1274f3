"""Validate predictions against published measurements, with each device left out of the prior for its rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edgetune.profile import prior, published
from edgetune.profile.device import Device, load
from edgetune.profile.facts import StrictRecord
from edgetune.profile.published import UNITS, Published, PublishedFigure
from edgetune.recipe.names import device_ids

Basis = Literal["device left out", "one row used"]
SUBJECTS = (
    "language models, from a shell", "language models, in the engine's own apps, Android",
    "language models, in the engine's own apps, Apple", "language models, in apps of others", "language models, all",
    "language models, other engines", "vision, same engine", "vision, other engines", "file size", "peak memory",
)  # fmt: skip


class CheckedPrediction(StrictRecord):
    """A prediction compared with a published figure. `error_pct` is positive if the prediction is higher."""

    predicted: float
    low: float
    high: float
    error_pct: float
    inside: bool  # the published figure is in the prediction interval


class Compared(StrictRecord):
    """One published figure and its predictions."""

    device: str
    engine: str
    setting: str
    subjects: tuple[str, ...]
    label: str
    unit: str
    published: float
    left_out: CheckedPrediction  # by a prior without this device
    one_row: CheckedPrediction | None  # also by the first row of the device and kind; none for that row itself
    counted: bool
    note: str
    source: str


class SubjectAccuracy(StrictRecord):
    """Accuracy of the predictions for the counted rows of a subject, in percent."""

    subject: str
    basis: Basis
    same_rows: bool  # only rows that have both predictions, for comparison
    rows: int
    within_10_pct: float
    within_20_pct: float
    within_40_pct: float
    covered_pct: float


class Missing(StrictRecord):
    """Published figures without a prediction, with the reason."""

    label: str
    figures: int
    why: str
    source: str


class Validation(StrictRecord):
    """The result of `edgetune devices validate`, apart from faults in descriptors."""

    rows: tuple[Compared, ...]
    missing: tuple[Missing, ...]
    shares: tuple[SubjectAccuracy, ...]


@dataclass(frozen=True)
class _Item:
    """A row that can be predicted: the figure without a prior, and its observation for the prior."""

    row: PublishedFigure
    predict_figure: float
    seen: prior.Seen
    width_keys: prior.Keys  # the terms that the width of the interval is taken from
    is_rate: bool  # a higher figure is a shorter time


def validate(devices: Mapping[str, Device] | None = None, rows: Published | None = None) -> Validation:
    """Predict all published rows that can be predicted; by default those of the package on all devices."""
    content = published.load_published() if rows is None else rows
    items, missing = _items(content, _all_devices() if devices is None else devices)
    compared = compare(items)
    missing += [
        Missing(label=f"{row.label}, {row.engine}: {row.value}", figures=1, why=row.why, source=row.source)
        for row in content.unpredicted
    ]
    return Validation(rows=compared, missing=tuple(missing), shares=_shares(compared))


def refit() -> prior.Prior:
    """The prior from every published row of a device with a descriptor in the package."""
    items, _ = _items(published.load_published(), _all_devices())
    return prior.fit_prior([item.seen for item in items if _teaches(item)])


def _all_devices() -> dict[str, Device]:
    return {name: load(name) for name in device_ids()}


def _items(content: Published, devices: Mapping[str, Device]) -> tuple[list[_Item], list[Missing]]:
    items: list[_Item] = []
    without: dict[tuple[str, str], int] = {}
    for row in published.figures_of(content):
        device = devices.get(row.column.device)
        if device is None:
            key = (row.column.device, row.table.source)
            without[key] = without.get(key, 0) + 1
            continue
        items.append(_item(row, device))
    missing = [
        Missing(label=name, figures=count, why="no descriptor of that device", source=source)
        for (name, source), count in without.items()
    ]
    return items, missing


def _item(row: PublishedFigure, device: Device) -> _Item:
    figure = published.predict_figure(row, device)
    is_rate = UNITS[row.table.quantity] == "tokens/s"
    log = math.log(figure / row.value) if is_rate else math.log(row.value / figure)
    table = row.table
    name: str = table.quantity
    keys = width_keys = (name, name, name)
    if row.subject != "memory":
        kind = {"decode_tokens_per_s": "decode", "prefill_tokens_per_s": "prefill"}.get(table.quantity, "vision")
        group = f"{kind} {prior.group_of(row.operators).partition(' ')[2]}"
        keys = prior.keys_of(group, device, table.setting, table.engine)
        # the uncertainty of a figure from an app is that of apps
        width_keys = prior.keys_of(group, device, "app", table.engine) if table.setting == "own app" else keys
    return _Item(row, figure, prior.Seen(device.id, keys, log), width_keys, is_rate)


def _teaches(item: _Item) -> bool:
    """Whether the prior learns from the row.

    Not from sizes, which are computed, nor from coarse figures, nor from an engine's app, which differs from a program
    in a shell; but iPhones only have apps.
    """
    app = item.row.table.setting == "own app" and "on Apple" not in item.seen.keys[0]
    return item.row.subject != "memory" and not item.row.coarse and not app


def compare(items: Sequence[_Item]) -> tuple[Compared, ...]:
    """Predict every row from those of other devices, and then also with one row of its device."""
    teaching = [item.seen for item in items if _teaches(item)]
    learned: dict[str, tuple[prior.Prior, dict[str, float]]] = {}
    for name in {item.seen.device for item in items}:
        others = [seen for seen in teaching if seen.device != name]
        fitted_prior = prior.fit_prior(others)
        learned[name] = fitted_prior, prior.trust(others, fitted_prior.offsets)
    used: dict[tuple[str, str], _Item] = {}
    for item in items:
        if _teaches(item):
            used.setdefault((item.seen.device, item.seen.keys[0]), item)
    return tuple(_compare_row(item, *learned[item.seen.device], used) for item in items)


def _compare_row(
    item: _Item, fitted_prior: prior.Prior, shares: dict[str, float], used: Mapping[tuple[str, str], _Item]
) -> Compared:
    row, keys = item.row, item.seen.keys
    memory = row.subject == "memory"
    log, width = (
        (0.0, math.log(1.1))
        if memory
        else (fitted_prior.offset_and_width(keys)[0], fitted_prior.offset_and_width(item.width_keys)[1])
    )
    one = used.get((item.seen.device, keys[0]))
    one_row = None
    if one is not None and one is not item:
        part = shares.get(keys[1], shares.get(keys[0], 0.5))
        missed = one.seen.log - fitted_prior.offset_and_width(one.seen.keys)[0]
        # the error that the used row shares with this one is known; the interval covers the rest
        one_row = _check_prediction(item, log + part * missed, max(width * math.sqrt(1 - part**2), math.log(1.1)))
    notes = [row.column.note] if row.column.note else []
    alone = not memory and not fitted_prior.has_data_for(keys)
    if row.coarse:
        notes.append(f"printed in steps of {row.table.rounded_to:g}: too coarse to count")
    if alone:
        notes.append("no other device has data for this kind of program: not counted")
    return Compared(
        device=item.seen.device,
        engine=row.table.engine,
        setting=row.table.setting,
        subjects=_subjects(row, "on Apple" in keys[0]),
        label=row.label,
        unit=UNITS[row.table.quantity],
        published=row.value,
        left_out=_check_prediction(item, log, width),
        one_row=one_row,
        counted=not (row.coarse or alone),
        note="; ".join(notes),
        source=row.table.source,
    )


def _subjects(row: PublishedFigure, apple: bool) -> tuple[str, ...]:
    if row.subject == "memory":
        return ("file size",) if row.table.quantity == "file_mib" else ("peak memory",)
    if row.subject == "language":
        where = {"shell": "from a shell", "app": "in apps of others"}.get(row.table.setting)
        if where is None:
            where = f"in the engine's own apps, {'Apple' if apple else 'Android'}"
        return f"language models, {where}", "language models, all"
    if row.subject == "vision":
        return ("vision, same engine",)
    return ("vision, other engines" if row.table.quantity == "latency_ms" else "language models, other engines",)


def _check_prediction(item: _Item, log: float, width: float) -> CheckedPrediction:
    """The figure with the learned offset of its time, `log`, and its interval, compared with the published one."""
    sign = -1 if item.is_rate else 1
    middle = item.predict_figure * math.exp(sign * log)
    low, high = middle * math.exp(-width), middle * math.exp(width)
    return CheckedPrediction(
        predicted=middle,
        low=low,
        high=high,
        error_pct=100 * (middle / item.row.value - 1),
        inside=low <= item.row.value <= high,
    )


def _shares(rows: Sequence[Compared]) -> tuple[SubjectAccuracy, ...]:
    shares = []
    for subject in SUBJECTS:
        own = [row for row in rows if row.counted and subject in row.subjects]
        both = [row for row in own if row.one_row is not None]
        for basis, same, predictions in (
            ("device left out", False, [row.left_out for row in own]),
            ("device left out", True, [row.left_out for row in both]),
            ("one row used", True, [row.one_row for row in both]),
        ):
            counted = [one for one in predictions if one is not None]
            if counted:
                shares.append(_share(subject, basis, same, counted))  # type: ignore[arg-type]
    return tuple(shares)


def _share(subject: str, basis: Basis, same_rows: bool, predictions: Sequence[CheckedPrediction]) -> SubjectAccuracy:
    def percent(limit: float) -> float:
        return 100 * sum(abs(one.error_pct) <= limit for one in predictions) / len(predictions)

    return SubjectAccuracy(
        subject=subject,
        basis=basis,
        same_rows=same_rows,
        rows=len(predictions),
        within_10_pct=percent(10),
        within_20_pct=percent(20),
        within_40_pct=percent(40),
        covered_pct=100 * sum(one.inside for one in predictions) / len(predictions),
    )


def to_json(validation: Validation | None) -> dict[str, object]:
    """The content of the JSON output; empty lists if nothing was compared."""
    if validation is None:
        return {"published": [], "missing": [], "shares": []}
    whole = validation.model_dump(mode="json")
    return {"published": whole["rows"], "missing": whole["missing"], "shares": whole["shares"]}


def format_lines(validation: Validation) -> list[str]:
    """The rows, what is missing and the shares, for a terminal."""
    output = ["published | device left out | one row of the device used", ""]
    source = ""
    for row in validation.rows:
        if row.source != source:
            source = row.source
            output += [f"{row.engine}; {source}"]
        output.append(f"  {_line(row)}")
    output += ["", "Not predicted:"]
    output += [
        f"  {row.label}{f', {row.figures} figures' * (row.figures > 1)}: {row.why}" for row in validation.missing
    ]
    output += ["", *(_sentence(share) for share in validation.shares)]
    return output


def _line(row: Compared) -> str:
    parts = [f"{row.device} {row.label}: {row.published:g} {row.unit}", _cell(row.left_out)]
    if "language" in row.subjects[0] or "vision" in row.subjects[0]:  # nothing is learned about sizes
        parts.append("the row used" if row.one_row is None else _cell(row.one_row))
    return " | ".join(parts) + (f" [{row.note}]" if row.note else "")


def _cell(prediction: CheckedPrediction) -> str:
    place = "inside" if prediction.inside else "outside"
    span = f"{prediction.low:.3g} to {prediction.high:.3g}"
    return f"{prediction.predicted:.3g} ({prediction.error_pct:+.0f} %; {span}, {place})"


def _sentence(share: SubjectAccuracy) -> str:
    which = " (the same rows)" if share.same_rows else ""
    return (
        f"{share.subject}, {share.basis}{which}: of {share.rows} rows {share.within_10_pct:.0f} % within 10 %, "
        f"{share.within_20_pct:.0f} % within 20 %, {share.within_40_pct:.0f} % within 40 %; "
        f"{share.covered_pct:.0f} % inside their prediction interval"
    )


if __name__ == "__main__":  # after a change to the predictor, a descriptor or the rows
    import sys
    from pathlib import Path

    prior.write(refit(), Path(sys.argv[1]))
