"""Cores, temperatures and clocks of this machine, and the memory of this process."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

SYS = Path("/sys")
PROC = Path("/proc")


def text_of(path: Path) -> str:
    """The stripped content of the file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip().strip("\0")
    except OSError:
        return ""


def number_in(path: Path) -> float | None:
    """The number in the file, if there is one."""
    try:
        return float(text_of(path))
    except ValueError:
        return None


def cpuinfo(proc_folder: Path = PROC) -> dict[str, str]:
    """Fields of the first processor in `/proc/cpuinfo`, and the common ones; none if there is no such file."""
    pairs = [line.partition(":") for line in text_of(proc_folder / "cpuinfo").splitlines()]
    return {key.strip(): value.strip() for key, _, value in reversed(pairs)}


def allowed_cores() -> tuple[int, ...]:
    """The cores that this process may use; empty if unknown."""
    affinity = getattr(os, "sched_getaffinity", None)
    return tuple(sorted(affinity(0))) if affinity is not None else ()


def usable_cores(sys_folder: Path = SYS) -> int:
    """How many cores this process may use, or fewer if its container has a smaller CPU quota."""
    allowed = len(allowed_cores()) or os.cpu_count() or 1
    quota, _, period = text_of(sys_folder / "fs/cgroup/cpu.max").partition(" ")  # "max 100000" if there is none
    return min(allowed, max(1, round(int(quota) / int(period)))) if quota.isdecimal() else allowed


def best_cores(threads: int, allowed: tuple[int, ...], sys_folder: Path = SYS) -> tuple[int, ...]:
    """The best of the allowed cores: the fastest first, and second threads of a core last."""

    def place(core: int) -> tuple[float, int, int]:
        folder = sys_folder / "devices/system/cpu" / f"cpu{core}"
        speed = number_in(folder / "cpu_capacity") or number_in(folder / "cpufreq/cpuinfo_max_freq") or 0.0
        siblings = text_of(folder / "topology/thread_siblings_list").replace("-", ",").split(",")
        return -speed, int(siblings[0].isdigit() and int(siblings[0]) != core), core

    second_last = sorted(allowed, key=lambda core: (place(core)[1], *place(core)))
    return tuple(sorted(second_last[:threads]))


def pin(threads: int) -> tuple[int, ...]:
    """Pin this process to that many cores. Returns them; empty if that is not possible."""
    allowed = allowed_cores()
    cores = best_cores(threads, allowed) if allowed else ()
    if cores:
        os.sched_setaffinity(0, cores)
    return cores


def state(sys_folder: Path = SYS) -> dict[str, dict[str, float]]:
    """Temperatures in degrees Celsius and clocks in MHz, as far as they can be read."""
    temperatures: dict[str, float] = {}
    for zone in sorted((sys_folder / "class/thermal").glob("thermal_zone*")):
        milli = number_in(zone / "temp")
        if milli is not None and -40e3 < milli < 200e3:  # a sensor that is off prints nonsense
            kind = text_of(zone / "type") or zone.name
            temperatures[kind if kind not in temperatures else f"{kind} {zone.name}"] = milli / 1e3
    clocks: dict[str, float] = {}
    for folder in (sys_folder / "devices/system/cpu").glob("cpu[0-9]*"):
        khz = number_in(folder / "cpufreq/scaling_cur_freq")
        if khz is not None:
            clocks[folder.name] = khz / 1e3
    return {"temperature_c": temperatures, "clock_mhz": dict(sorted(clocks.items()))}


def facts(proc_folder: Path = PROC) -> dict[str, Any]:
    """Model and size of this machine."""
    board = text_of(proc_folder / "device-tree/model")
    named = cpuinfo(proc_folder)
    model = board or named.get("Model") or named.get("model name") or platform.processor() or ""
    return {
        "model": model,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cores": usable_cores(),
    }


def resident_mib(field: str) -> float:
    """Resident memory of this process, `VmRSS` now or `VmHWM` at its peak.

    Linux resets only this peak in a child: `ru_maxrss` of a fork includes its parent's.
    """
    for line in text_of(PROC / "self/status").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
