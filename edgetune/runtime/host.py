"""Facts of this machine, as its operating system prints them; null if it does not."""

from __future__ import annotations

import platform
import re
import time
from pathlib import Path
from typing import Any

import torch

from edgetune.runtime.clock.machine import cpuinfo, text_of, usable_cores

_MEMINFO = Path("/proc/meminfo")
_CPU_FOLDER = Path("/sys/devices/system/cpu/cpu0")

# flags of /proc/cpuinfo ("flags" on x86, "Features" on Arm) -> flags of a descriptor
_FLAGS = {
    "asimd": "neon", "neon": "neon", "asimddp": "dotprod", "asimdhp": "fp16", "bf16": "bf16", "i8mm": "i8mm",
    "sve2": "sve2", "avx2": "avx2", "avx512f": "avx512", "avx512_vnni": "vnni", "avx_vnni": "vnni",
    "avx512_bf16": "bf16", "amx_int8": "amx",
}  # fmt: skip

Sourced = dict[str, Any]


def sourced(value: float | list[str] | None, unit: str, source: str, trust: str, unknown: str) -> Sourced:
    """One sourced value of a descriptor; null with the reason if it is unknown."""
    if value is None:
        return {"value": None, "unknown": unknown}
    named = {"unit": unit} if unit else {}
    return {"value": value, **named, "source": source, "trust": trust}


def cpu_name() -> str:
    """Name of the processor."""
    fields = cpuinfo()
    named = fields.get("model name") or fields.get("Hardware") or fields.get("Model")
    return named or platform.processor() or platform.machine() or "unknown"


def flags_of(fields: dict[str, str]) -> list[str] | None:
    """Descriptor flags among those printed; `None` when the system prints none at all.

    >>> flags_of({"Features": "fp asimd asimddp"}), flags_of({})
    (['neon', 'dotprod'], None)
    """
    printed = (fields.get("flags") or fields.get("Features") or "").split()
    return list(dict.fromkeys(_FLAGS[flag] for flag in printed if flag in _FLAGS)) if printed else None


def macs_per_cycle(flags: list[str] | None) -> float | None:
    """fp32 multiply-accumulates per cycle that the widest flag allows: two pipes of that width."""
    if flags is None:
        return None
    widths = {"avx512": 32.0, "avx2": 16.0, "neon": 8.0}
    return next((macs for flag, macs in widths.items() if flag in flags), 4.0)


def is_virtual() -> bool:
    """Whether this is a virtual machine, by the processor's flags."""
    return "hypervisor" in cpuinfo().get("flags", "").split()


def cache_kib(level: int) -> float | None:
    """Size of the unified or data cache of that level, from sysfs."""
    for index in sorted((_CPU_FOLDER / "cache").glob("index*")):
        try:
            kind = (index / "type").read_text(encoding="utf-8").strip()
            size = (index / "size").read_text(encoding="utf-8").strip()
            cache_level = int((index / "level").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        match = re.fullmatch(r"(\d+)([KMG])", size)
        if cache_level == level and kind != "Instruction" and match is not None:
            return float(int(match[1]) * {"K": 1, "M": 1024, "G": 1024**2}[match[2]])
    return None


def ram_gib() -> float | None:
    """Size of main memory."""
    match = re.search(r"^MemTotal:\s+(\d+) kB", text_of(_MEMINFO), re.MULTILINE)
    return round(int(match[1]) / 1024**2, 2) if match is not None else None


def copy_gb_s(threads: int, mib: int = 256, rounds: int = 5) -> float:
    """Measured memory bandwidth: bytes read and written per second by the best of several big copies."""
    before = torch.get_num_threads()
    source = torch.ones(mib * 1024 * 256, dtype=torch.float32)
    target = torch.empty_like(source)
    try:
        torch.set_num_threads(threads)
        target.copy_(source)  # the first touch of the pages is not measured
        best = min(_seconds(source, target) for _ in range(rounds))
    finally:
        torch.set_num_threads(before)
    return 2 * mib * 1024**2 / best / 1e9


def _seconds(source: torch.Tensor, target: torch.Tensor) -> float:
    start = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - start


def describe(threads: int, bandwidth_gb_s: float) -> dict[str, Any]:
    """A descriptor of this host, as in YAML, without a calibration."""
    fields, name = cpuinfo(), cpu_name()
    flags, printed = flags_of(fields), "/proc/cpuinfo"
    mhz = float(fields["cpu MHz"]) if re.fullmatch(r"\d+(\.\d+)?", fields.get("cpu MHz", "")) else None
    no_print = "the operating system does not print it"
    unseen = {"value": None, "unknown": no_print}
    l2, last = cache_kib(2), cache_kib(3) or cache_kib(2)
    cluster = {
        "core": name,
        "count": sourced(usable_cores(), "", "scheduler affinity and CPU quota of the process", "high", ""),
        "ghz": sourced(
            round(mhz / 1000, 3) if mhz else None, "GHz", f"{printed}: clock at the time", "medium", no_print
        ),
        "fp32_macs_per_cycle": sourced(
            macs_per_cycle(flags), "MAC/cycle", "two pipes of the widest vector flag: a guess", "low", no_print
        ),
    }
    return {
        "format": 1,
        "id": "host",
        "name": f"this host ({platform.system()} {platform.machine()})",
        "soc": name,
        "family": "computer",
        "clusters": [cluster],
        "threads": sourced(threads, "", "chosen for the calibration", "high", ""),
        "isa": sourced(flags, "", printed, "high", no_print),
        "memory": {
            "bus_bits": unseen,
            "mega_transfers_per_s": unseen,
            "bandwidth_gb_s": sourced(
                round(bandwidth_gb_s, 2), "GB/s", f"measured: copy of 256 MiB with {threads} threads", "high", ""
            ),
            "ram_gib": sourced(ram_gib(), "GiB", str(_MEMINFO), "high", no_print),
            "usable_app_memory_mib": {"value": None, "unknown": "depends on the other processes"},
        },
        "caches": {
            "l2_kib": sourced(l2, "KiB", "sysfs", "high", no_print),
            "last_level_kib": sourced(last, "KiB", "sysfs", "high", no_print),
        },
        "accelerators": [],
        "power": {"low_w": unseen, "high_w": unseen},
        "storage": {"kind": unseen, "read_mb_s": unseen, "capacity_gib": unseen},
        "targets": ["xnnpack"],
    }
