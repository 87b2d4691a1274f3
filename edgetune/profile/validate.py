"""Predictions held against measurements that others published, each device's own rows left out of what is learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edgetune.profile import prior, published
from edgetune.profile.device import Device, load
from edgetune.profile.facts import Value
from edgetune.profile.published import UNITS, Published, Row
from edgetune.recipe.names import ids

Basis = Literal["device left out", "one row used"]
SUBJECTS = (
    "language models, from a shell", "language models, in the engine's own apps, Android",
    "language models, in the engine's own apps, Apple", "language models, in apps of others", "language models, all",
    "language models, other engines", "vision, same engine", "vision, other engines", "file size", "peak memory",
)  # fmt: skip


class Told(Value):
    """One prediction beside the published figure. `error_pct`: predicted above published is positive."""

    predicted: float
    low: float
    high: float
    error_pct: float
    inside: bool  # the published figure lies in the band


class Compared(Value):
    """One published figure and what is predicted for it."""

    device: str
    engine: str
    setting: str
    subjects: tuple[str, ...]
    what: str
    unit: str
    published: float
    left_out: Told  # nothing of this device was used
    one_row: Told | None  # the first row of the device and kind was; none for that row itself
    counted: bool
    note: str
    source: str


class Share(Value):
    """How many of the counted rows of a subject are predicted how well, in per cent."""

    subject: str
    basis: Basis
    same_rows: bool  # only those rows that have both, so that the two can be compared
    rows: int
    within_10_pct: float
    within_20_pct: float
    within_40_pct: float
    covered_pct: float


class Missing(Value):
    """Published figures that are not predicted, with the reason."""

    what: str
    figures: int
    why: str
    source: str


class Validation(Value):
    """What `edgetune devices validate` found beyond the descriptors themselves."""

    rows: tuple[Compared, ...]
    missing: tuple[Missing, ...]
    shares: tuple[Share, ...]


@dataclass(frozen=True)
class _Item:
    """A row that can be predicted: the figure by the predictor alone, and what its error adds to the prior."""

    row: Row
    base: float
    seen: prior.Seen
    band: prior.Keys  # the terms whose errors the band is taken from
    faster: bool  # a higher figure is a shorter time


def validate(devices: Mapping[str, Device] | None = None, rows: Published | None = None) -> Validation:
    """Predict every published row that can be; by default on all devices known here, the rows as shipped."""
    content = published.shipped() if rows is None else rows
    items, missing = _items(content, _known() if devices is None else devices)
    compared = compare(items)
    return Validation(rows=compared, missing=(*missing, *_unpredicted(content)), shares=_shares(compared))


def refit() -> prior.Prior:
    """The prior from every published row of a device with a descriptor in the package."""
    items, _ = _items(published.shipped(), _known())
    return prior.fitted([item.seen for item in items if _teaches(item)])


def _known() -> dict[str, Device]:
    return {name: load(name) for name in ids()}


def _items(content: Published, devices: Mapping[str, Device]) -> tuple[list[_Item], list[Missing]]:
    items: list[_Item] = []
    without: dict[tuple[str, str], int] = {}
    for row in published.rows_of(content):
        device = devices.get(row.column.device)
        if device is None:
            key = (row.column.device, row.table.source)
            without[key] = without.get(key, 0) + 1
            continue
        items.append(_item(row, device))
    missing = [
        Missing(what=name, figures=count, why="no descriptor of that device", source=source)
        for (name, source), count in without.items()
    ]
    return items, missing


def _item(row: Row, device: Device) -> _Item:
    figure = published.base(row, device)
    faster = UNITS[row.table.quantity] == "tokens/s"
    log = math.log(figure / row.value) if faster else math.log(row.value / figure)
    table = row.table
    name: str = table.quantity
    keys = band = (name, name, name)
    if row.subject != "memory":
        kind = {"decode_tokens_per_s": "decode", "prefill_tokens_per_s": "prefill"}.get(table.quantity, "vision")
        group = f"{kind} {prior.group_of(row.operators).partition(' ')[2]}"
        keys = prior.keys_of(group, device, table.setting, table.engine)
        # nobody's errors but those of apps tell how far a figure from an app may be off
        band = prior.keys_of(group, device, "app", table.engine) if table.setting == "own app" else keys
    return _Item(row, figure, prior.Seen(device.id, keys, log), band, faster)


def _teaches(item: _Item) -> bool:
    """Whether the prior learns from the row.

    Sizes are computed, a coarse figure is no measure, and an engine's app says little of what its program does from a
    shell; of Apple's phones there are only apps.
    """
    app = item.row.table.setting == "own app" and "on Apple" not in item.seen.keys[0]
    return item.row.subject != "memory" and not item.row.coarse and not app


def compare(items: Sequence[_Item]) -> tuple[Compared, ...]:
    """Every row predicted from the others' rows, then with one row of its device."""
    teaching = [item.seen for item in items if _teaches(item)]
    learned: dict[str, tuple[prior.Prior, dict[str, float]]] = {}
    for name in {item.seen.device for item in items}:
        others = [seen for seen in teaching if seen.device != name]
        found = prior.fitted(others)
        learned[name] = found, prior.trust(others, found.offsets)
    used: dict[tuple[str, str], _Item] = {}
    for item in items:
        if _teaches(item):
            used.setdefault((item.seen.device, item.seen.keys[0]), item)
    return tuple(_compared(item, *learned[item.seen.device], used) for item in items)


def _compared(
    item: _Item, found: prior.Prior, shares: dict[str, float], used: Mapping[tuple[str, str], _Item]
) -> Compared:
    row, keys = item.row, item.seen.keys
    memory = row.subject == "memory"
    log, width = (0.0, math.log(1.1)) if memory else (found.told(keys)[0], found.told(item.band)[1])
    one = used.get((item.seen.device, keys[0]))
    one_row = None
    if one is not None and one is not item:
        part = shares.get(keys[1], shares.get(keys[0], 0.5))
        missed = one.seen.log - found.told(one.seen.keys)[0]
        # what the used row shares with this one is known now: the band keeps the rest
        one_row = _told(item, log + part * missed, max(width * math.sqrt(1 - part**2), math.log(1.1)))
    notes = [row.column.note] if row.column.note else []
    alone = not memory and not found.speaks(keys)
    if row.coarse:
        notes.append(f"printed in steps of {row.table.rounded_to:g}: too coarse to count")
    if alone:
        notes.append("no other device has data for this kind of program: not counted")
    return Compared(
        device=item.seen.device,
        engine=row.table.engine,
        setting=row.table.setting,
        subjects=_subjects(row, "on Apple" in keys[0]),
        what=row.what,
        unit=UNITS[row.table.quantity],
        published=row.value,
        left_out=_told(item, log, width),
        one_row=one_row,
        counted=not (row.coarse or alone),
        note="; ".join(notes),
        source=row.table.source,
    )


def _subjects(row: Row, apple: bool) -> tuple[str, ...]:
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


def _told(item: _Item, log: float, width: float) -> Told:
    """The figure with the learned offset of its time, `log`, and the band around it."""
    sign = -1 if item.faster else 1
    middle = item.base * math.exp(sign * log)
    low, high = middle * math.exp(-width), middle * math.exp(width)
    return Told(
        predicted=middle,
        low=low,
        high=high,
        error_pct=100 * (middle / item.row.value - 1),
        inside=low <= item.row.value <= high,
    )


def _shares(rows: Sequence[Compared]) -> tuple[Share, ...]:
    found = []
    for subject in SUBJECTS:
        own = [row for row in rows if row.counted and subject in row.subjects]
        both = [row for row in own if row.one_row is not None]
        for basis, same, told in (
            ("device left out", False, [row.left_out for row in own]),
            ("device left out", True, [row.left_out for row in both]),
            ("one row used", True, [row.one_row for row in both]),
        ):
            counted = [one for one in told if one is not None]
            if counted:
                found.append(_share(subject, basis, same, counted))  # type: ignore[arg-type]
    return tuple(found)


def _share(subject: str, basis: Basis, same_rows: bool, told: Sequence[Told]) -> Share:
    def percent(limit: float) -> float:
        return 100 * sum(abs(one.error_pct) <= limit for one in told) / len(told)

    return Share(
        subject=subject,
        basis=basis,
        same_rows=same_rows,
        rows=len(told),
        within_10_pct=percent(10),
        within_20_pct=percent(20),
        within_40_pct=percent(40),
        covered_pct=100 * sum(one.inside for one in told) / len(told),
    )


def _unpredicted(content: Published) -> tuple[Missing, ...]:
    return tuple(
        Missing(what=f"{row.what}, {row.engine}: {row.value}", figures=1, why=row.why, source=row.source)
        for row in content.unpredicted
    )


def plain(found: Validation | None) -> dict[str, object]:
    """As JSON has it; nothing compared gives empty lists."""
    if found is None:
        return {"published": [], "missing": [], "shares": []}
    whole = found.model_dump(mode="json")
    return {"published": whole["rows"], "missing": whole["missing"], "shares": whole["shares"]}


def lines(found: Validation) -> list[str]:
    """The rows, what is missing and the shares, for a terminal."""
    told = ["published | device left out | one row of the device used", ""]
    source = ""
    for row in found.rows:
        if row.source != source:
            source = row.source
            told += [f"{row.engine}; {source}"]
        told.append(f"  {_line(row)}")
    told += ["", "Not predicted:"]
    told += [f"  {one.what}{_figures(one.figures)}: {one.why}" for one in found.missing]
    told += ["", *(_sentence(share) for share in found.shares)]
    return told


def _line(row: Compared) -> str:
    parts = [f"{row.device} {row.what}: {row.published:g} {row.unit}", _cell(row.left_out)]
    if "language" in row.subjects[0] or "vision" in row.subjects[0]:  # nothing is learned about sizes
        parts.append("the row used" if row.one_row is None else _cell(row.one_row))
    return " | ".join(parts) + (f" [{row.note}]" if row.note else "")


def _cell(told: Told) -> str:
    place = "inside" if told.inside else "outside"
    return f"{told.predicted:.3g} ({told.error_pct:+.0f} %; {told.low:.3g} to {told.high:.3g}, {place})"


def _figures(count: int) -> str:
    return f", {count} figures" if count > 1 else ""


def _sentence(share: Share) -> str:
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
