"""Descriptors as text: one line each, or one in full with the source and trust of every number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from edgetune.core.errors import EdgetuneError
from edgetune.core.ledger import on_cpu
from edgetune.core.numbers import align_columns
from edgetune.profile.device import Device, Family, load
from edgetune.profile.facts import Fact, Flags, StorageKind
from edgetune.recipe.names import device_ids, user_descriptors


@dataclass(frozen=True)
class DeviceEntry:
    """One device name. `fault`: why its file is invalid; the other fields are then empty."""

    id: str
    name: str = ""
    soc: str = ""
    family: str = ""
    ram_gib: float | None = None
    bandwidth_gb_s: float | None = None
    calibrated: bool = False
    own: bool = False  # in the user's folder
    fault: str = ""


def list_entries() -> tuple[DeviceEntry, ...]:
    """Every name that `load` accepts, by family; invalid ones last."""
    mine = user_descriptors()
    order = {family: number for number, family in enumerate(get_args(Family))}
    all_entries = [_entry(name, name in mine) for name in device_ids()]
    return tuple(sorted(all_entries, key=lambda entry: order.get(entry.family, len(order))))


def _entry(name: str, mine: bool) -> DeviceEntry:
    try:
        device = load(name)
    except EdgetuneError as error:
        return DeviceEntry(name, own=mine, fault=str(error).split("\n", 1)[0])
    return DeviceEntry(
        id=name,
        name=device.name,
        soc=device.soc,
        family=device.family,
        ram_gib=device.memory.ram_gib.value,
        bandwidth_gb_s=device.memory.bandwidth_gb_s.value,
        calibrated=device.calibration is not None,
        own=mine,
    )


def format_entries(list_entries: Sequence[DeviceEntry]) -> str:
    """A table grouped by family; `?` for unknown values."""
    head = ("id", "name", "SoC", "RAM", "GB/s", "")
    rows = [_row(entry) for entry in list_entries if not entry.fault]
    first, *table = [f"  {line}" for line in align_columns((head, *rows), right={3, 4})]
    lines, family = [first], ""
    for entry, line in zip((e for e in list_entries if not e.fault), table, strict=True):
        if entry.family != family:
            family = entry.family
            lines += ["", family]
        lines.append(line)
    faults = [f"  {entry.id}: {entry.fault}" for entry in list_entries if entry.fault]
    return "\n".join(lines + (["", "invalid descriptors", *faults] if faults else []))


def _row(entry: DeviceEntry) -> tuple[str, ...]:
    marks = [word for word, is_so in (("calibrated", entry.calibrated), ("your own", entry.own)) if is_so]
    gb_s = "?" if entry.bandwidth_gb_s is None else f"{entry.bandwidth_gb_s:.1f}"
    return (entry.id, entry.name, entry.soc, _ram(entry.ram_gib), gb_s, ", ".join(marks))


def _ram(gib: float | None) -> str:
    if gib is None:
        return "?"
    return f"{gib:g} GiB" if gib >= 0.5 else f"{gib * 1024:.1f} MiB"


def describe_device(device: Device) -> str:
    """All facts of a device, each with its trust and source."""
    section = device.calibration
    lines = [
        f"{device.id}: {device.name}, {device.soc} ({device.family})",
        f"targets: {', '.join(device.targets)}",
        f"predicted: {_prediction_scope(device)}",
        f"calibration: {'none; predictions use priors' if section is None else section.date}",
        "",
    ]
    facts = [(path, _value(fact), fact) for path, fact in device.facts()]
    widest, longest = max(len(path) for path, _, _ in facts), max(len(value) for _, value, _ in facts)
    for path, value, fact in facts:
        lines += _heading(device, path)
        origin = f"{fact.trust:<6}  {fact.source}" if fact.trust is not None else f"{'':<6}  {fact.unknown}"
        lines.append(f"  {path:<{widest}}  {value:>{longest}}  {origin}")
    return "\n".join(lines + (["", "notes", *(f"  {note}" for note in device.notes)] if device.notes else []))


def _prediction_scope(device: Device) -> str:
    """What predictions cover and what they do not: a board's CPU is not the board."""
    if device.no_runtime:
        return f"as if it had a runtime, but it has none: {device.no_runtime}"
    threads = device.calibration.threads if device.calibration is not None else device.thread_count
    kinds = ", ".join(dict.fromkeys(accelerator.kind.upper() for accelerator in device.accelerators))
    return on_cpu(threads) + (f"; {kinds}: not predicted" if kinds else "")


def _value(fact: Fact | Flags | StorageKind) -> str:
    if fact.value is None:
        return "unknown"
    if isinstance(fact, Fact):
        return f"{fact.value:g} {fact.unit}".rstrip()
    return fact.value if isinstance(fact, StorageKind) else " ".join(fact.value) or "none"


def _heading(device: Device, path: str) -> list[str]:
    """A heading in front of the first fact of a cluster or an accelerator."""
    field, _, rest = path.partition(".")
    number, _, name = rest.partition(".")
    if field == "clusters" and name == "count":
        return [f"{device.clusters[int(number)].core}"]
    if field == "accelerators" and name == "clock_mhz":
        accelerator = device.accelerators[int(number)]
        return [
            f"{accelerator.name}: {accelerator.kind}, " + (accelerator.target or f"no target ({accelerator.unreached})")
        ]
    return ["whole device"] if path == "threads" else []
