"""Energy of a run, by the machine's own meter, if there is one: RAPL, a Jetson's tegrastats, or the battery.

Every meter counts all that its sensor covers, idle power included; its name says what that is.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from .machine import SYS, number_in, text_of

# sets of tegrastats' rails that make a whole module, the one that is already a sum first
_RAILS = (
    ("VDD_IN",),
    ("POM_5V_IN",),
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
)
_LEAST_W, _MOST_W = 0.05, 500.0  # a reading outside is in other units than the kernel's documentation states
_INTERVAL_SECONDS = 0.1
_LEAST_SAMPLES = 5


def energy(once: Callable[[], float], seconds: float, sys_folder: Path = SYS) -> dict[str, Any]:
    """Millijoules of one run, from runs for about `seconds`: `energy_mj`, or null with the reason."""
    meter, why = find_meter(sys_folder)
    if meter is None:
        return {"energy_mj": None, "energy_note": why}
    runs, begun = 0, time.perf_counter()
    meter.start()
    while runs == 0 or time.perf_counter() - begun < seconds:
        once()
        runs += 1
        meter.tick()
    joules, why = meter.stop(time.perf_counter() - begun)
    if joules is None:
        return {"energy_mj": None, "energy_note": why}
    return {"energy_mj": joules * 1e3 / runs, "energy_note": f"{why}, idle included, mean of {runs} runs"}


class Meter:
    """Counts joules between `start` and `stop`, which also returns what was counted, or why nothing was."""

    def start(self) -> None:
        """Begin."""

    def tick(self) -> None:
        """Called after every run."""

    def stop(self, seconds: float) -> tuple[float | None, str]:
        """Joules of these seconds."""
        raise NotImplementedError


def find_meter(sys_folder: Path = SYS) -> tuple[Meter | None, str]:
    """The machine's meter, or the reason why there is none."""
    zones = rapl_zones(sys_folder)
    if zones:
        readable = [zone for zone in zones if number_in(zone / "energy_uj") is not None]
        if len(readable) == len(zones):
            return Rapl(zones), ""
        return None, f"{zones[0] / 'energy_uj'} can only be read by root"
    program = shutil.which("tegrastats")
    if program is not None:
        return Tegrastats(program), ""
    return battery(sys_folder)


def rapl_zones(sys_folder: Path = SYS) -> list[Path]:
    """The zones to add up: each package, and memory if it is counted separately."""
    zones = sorted((sys_folder / "class/powercap").glob("intel-rapl:*"))  # AMD's too; not the copies of intel-rapl-mmio
    named = {zone: text_of(zone / "name") for zone in zones}
    packages = [zone for zone, name in named.items() if name.startswith("package")]
    memory = [zone for zone, name in named.items() if name == "dram"]
    return packages + memory if packages else []


class Rapl(Meter):
    """Running average power limit: counters of microjoules in the processor."""

    def __init__(self, zones: list[Path]) -> None:
        self.zones = zones
        self.before: list[float] = []

    def _read(self) -> list[float]:
        return [number_in(zone / "energy_uj") or 0.0 for zone in self.zones]

    def start(self) -> None:
        """Read the counters."""
        self.before = self._read()

    def stop(self, seconds: float) -> tuple[float | None, str]:
        """Read them again; a counter may have wrapped around once."""
        names = ", ".join(text_of(zone / "name") for zone in self.zones)
        joules = 0.0
        for zone, before, after in zip(self.zones, self.before, self._read()):  # noqa: B905  runs on older Pythons too
            rounds = number_in(zone / "max_energy_range_uj") or 0.0
            joules += (after - before + (rounds if after < before else 0.0)) / 1e6
        return (joules, f"RAPL: {names}") if joules > 0 else (None, f"RAPL: {names}: the counters do not move")


def rails_w(line: str) -> dict[str, float]:
    """Watts now of each rail in a line of tegrastats.

    >>> rails_w("GR3D_FREQ 0% VDD_IN 4540mW/4500mW VDD_SOC 1423mW/1423mW")
    {'VDD_IN': 4.54, 'VDD_SOC': 1.423}
    >>> rails_w("RAM 1/2MB POM_5V_IN 2053/2100 POM_5V_CPU 282/282")
    {'POM_5V_IN': 2.053, 'POM_5V_CPU': 0.282}
    """
    with_unit = re.findall(r"(?<!\S)([A-Z][A-Z0-9_]*) (\d+)mW/\d+mW", line)
    bare = re.findall(r"(?<!\S)(POM_[A-Z0-9_]+|VDD_[A-Z0-9_]+) (\d+)/\d+(?!\S)", line)  # the first Jetsons
    return {name: int(milliwatts) / 1e3 for name, milliwatts in (*with_unit, *bare)}


def module_w(line: str) -> tuple[float, str] | None:
    """Watts of the whole module in a line of tegrastats, and the rails they are the sum of."""
    rails = rails_w(line)
    for names in _RAILS:
        if all(name in rails for name in names):
            return sum(rails[name] for name in names), " + ".join(names)
    return None


class Tegrastats(Meter):
    """NVIDIA's reader of a Jetson's power sensors, as a child process."""

    def __init__(self, program: str) -> None:
        self.program = program
        self.printed: IO[bytes] | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it."""
        self.printed = tempfile.TemporaryFile()  # noqa: SIM115  closed by `stop`
        arguments = [self.program, "--interval", str(round(_INTERVAL_SECONDS * 1e3))]
        self.process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=self.printed, stderr=subprocess.DEVNULL
        )

    def stop(self, seconds: float) -> tuple[float | None, str]:
        """Stop it, and take the mean of what it printed."""
        assert self.process is not None
        assert self.printed is not None
        self.process.terminate()
        self.process.wait()
        self.printed.seek(0)
        lines = self.printed.read().decode("utf-8", "replace").splitlines()
        self.printed.close()
        read = [watts for watts in map(module_w, lines) if watts is not None]
        if len(read) < _LEAST_SAMPLES:
            return None, f"tegrastats printed the module's power {len(read)} times, {_LEAST_SAMPLES} are needed"
        return statistics.fmean(watts for watts, _ in read) * seconds, f"tegrastats: {read[0][1]}"


def battery_w(fields: dict[str, str]) -> tuple[float | None, str]:
    """Watts from a battery, by the files of its folder under /sys/class/power_supply; else the reason.

    The kernel's units are microamperes, microvolts and microwatts; some phones use others.

    >>> battery_w({"type": "Battery", "status": "Discharging", "current_now": "-350000", "voltage_now": "4000000"})
    (1.4, '')
    >>> battery_w({"type": "Battery", "status": "Charging", "current_now": "350000", "voltage_now": "4000000"})
    (None, 'the battery is not discharging (Charging): what it gives is not what the run takes')
    """
    status = fields.get("status", "unknown")
    if status != "Discharging":
        return None, f"the battery is not discharging ({status}): what it gives is not what the run takes"
    try:
        if fields.get("power_now"):
            watts = abs(float(fields["power_now"])) / 1e6
        else:
            watts = abs(float(fields["current_now"]) * float(fields["voltage_now"])) / 1e12
    except (KeyError, ValueError):
        return None, "the battery does not print its current and voltage"
    if not _LEAST_W <= watts <= _MOST_W:
        return None, f"the battery prints {watts:.3g} W, which cannot be: its units are not the kernel's"
    return watts, ""


def battery_fields(folder: Path) -> dict[str, str]:
    """The input of `battery_w`."""
    names = ("type", "scope", "status", "power_now", "current_now", "voltage_now")
    return {name: text_of(folder / name) for name in names}


def battery(sys_folder: Path = SYS) -> tuple[Meter | None, str]:
    """The battery that powers the machine; else the reason."""
    why = "neither RAPL nor tegrastats nor a battery is here"
    for folder in sorted((sys_folder / "class/power_supply").glob("*")):
        fields = battery_fields(folder)
        if fields["type"] == "Battery" and fields["scope"] != "Device":  # a mouse's battery is a device's
            watts, why = battery_w(fields)
            if watts is not None:
                return Battery(folder), ""
    return None, why


class Battery(Meter):
    """The battery's power, read at intervals."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.next = 0.0
        self.read: list[float] = []

    def start(self) -> None:
        """Begin without readings."""
        self.read, self.next = [], 0.0

    def tick(self) -> None:
        """Read it, if it is time."""
        if time.perf_counter() >= self.next:
            watts, _ = battery_w(battery_fields(self.folder))
            self.read += [watts] if watts is not None else []
            self.next = time.perf_counter() + _INTERVAL_SECONDS

    def stop(self, seconds: float) -> tuple[float | None, str]:
        """The mean of what was read."""
        if len(self.read) < _LEAST_SAMPLES:
            return None, f"the battery was read {len(self.read)} times, {_LEAST_SAMPLES} are needed"
        return statistics.fmean(self.read) * seconds, f"battery {self.folder.name}: the whole device"
