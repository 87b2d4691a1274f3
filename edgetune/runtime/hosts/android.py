"""Parse the output of adb, of Android's services and of executorch's runner."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass

from edgetune.runtime.clock.power import battery_w

_POWER = "/sys/class/power_supply/battery"
_LEAST_SAMPLES = 3

# prints one line for each readable sensor: its path and its value
SENSORS = (
    "for f in /sys/class/thermal/thermal_zone*/temp /sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq; do "
    'v=$(cat $f 2>/dev/null) && echo "$f $v $(cat ${f%/temp}/type 2>/dev/null)"; done; true'
)


def watch_script(folder: str, command: str) -> str:
    """A shell script that runs the command and prints its peak memory and the battery ten times a second."""
    files = " ".join(f"{_POWER}/{name}" for name in ("status", "current_now", "voltage_now"))
    battery = f"echo battery $(cat {files} 2>/dev/null)"  # unquoted: three lines become three words
    return (
        f"cd {folder} && {{ {command} >log 2>&1 & p=$!; while kill -0 $p 2>/dev/null; do "
        f"grep VmHWM /proc/$p/status 2>/dev/null; {battery}; sleep 0.1; done; wait $p; c=$?; "
        "[ $c = 0 ] || cat log; rm -f log; exit $c; }"
    )


def parse_devices(printed: str) -> dict[str, str]:
    """Serials and their states, from `adb parse_devices`.

    >>> parse_devices("List of devices attached\\nR5CT\\tdevice\\nX1\\tunauthorized\\n\\n")
    {'R5CT': 'device', 'X1': 'unauthorized'}
    """
    lines = (line.partition("\t") for line in printed.splitlines() if "\t" in line)
    return {serial.strip(): state.strip() for serial, _, state in lines}


@dataclass(frozen=True)
class Log:
    """The runner's log of a batch."""

    load_ms: float
    runs: int
    total_ms: float  # of all runs
    runs_ms: list[float]  # of each, if it prints them


def parse_log(printed: str) -> Log | None:
    """The times in a runner's log; None if there are none.

    >>> parse_log("I 00:00:00.5 executorch:executor_runner.cpp:1] Model loaded in 4.5 ms.\\n"
    ...        "... Iteration 1 of 1: 2.25 ms\\n... Model executed successfully 1 time(s) in 2.25 ms.")
    Log(load_ms=4.5, runs=1, total_ms=2.25, runs_ms=[2.25])
    """
    whole = re.search(r"Model executed successfully (\d+) time\(s\) in ([\d.]+) ms", printed)
    load_ms = _load_ms(printed)
    if whole is None or load_ms is None:
        return None
    runs = [float(ms) for ms in re.findall(r"Iteration \d+ of \d+: ([\d.]+) ms", printed)]
    return Log(load_ms, int(whole[1]), float(whole[2]), runs)


def _load_ms(printed: str) -> float | None:
    """As logged, or, for an older runner, by the log's clock, which begins with the process."""
    match = re.search(r"Model loaded in ([\d.]+) ms", printed)
    if match is not None:
        return float(match[1])
    stamp = re.search(r"^\w (\d+):(\d+):([\d.]+) executorch:\S+\] (?:Method loaded|Inputs prepared)", printed, re.M)
    if stamp is None:
        return None
    return (int(stamp[1]) * 3600 + int(stamp[2]) * 60 + float(stamp[3])) * 1e3


def peak_mib(printed: str) -> float | None:
    """Peak resident memory, from lines of /proc/PID/status."""
    sizes_kib = [int(kib) for kib in re.findall(r"^VmHWM:\s+(\d+) kB", printed, re.M)]
    return max(sizes_kib) / 1024 if sizes_kib else None


def power_w(watched: str, service: str) -> tuple[float | None, str]:
    """Mean watts of the phone while it was observed, and the meter; else None and the reason.

    `service`: the output of `dumpsys battery`: while the phone charges, also by adb's cable, its battery shows nothing.
    """
    powered = re.search(r"^\s*(\w+) powered: true", service, re.M)
    if powered is not None:
        why = f"the phone is powered by {powered[1]}, so its battery does not show the energy of a run"
        return None, f"{why}: use adb over Wi-Fi"
    read, why = [], "the battery cannot be read by adb's shell"
    for line in re.findall(r"^battery (.+)$", watched, re.M):
        status, *numbers = line.rsplit(maxsplit=2)
        if len(numbers) == 2:
            watts, why = battery_w({"status": status, "current_now": numbers[0], "voltage_now": numbers[1]})
            read += [watts] if watts is not None else []
    if len(read) < _LEAST_SAMPLES:
        return None, why or f"the battery was read {len(read)} times, {_LEAST_SAMPLES} are needed"
    return statistics.fmean(read), f"battery: the whole phone, idle included, mean of {len(read)} readings"


def parse_state(thermal: str, sensors: str) -> dict[str, dict[str, float]]:
    """Temperatures and clocks, from `dumpsys thermalservice` or else the sensors, and from the sensors' lines."""
    _, _, now = thermal.partition("Current temperatures from HAL:")
    listed = now.partition("Current cooling")[0]
    readings = re.findall(r"Temperature\{mValue=(-?[\d.]+), mType=-?\d+, mName=([^,]+),", listed)
    temperatures = {name: float(value) for value, name in readings if float(value) != 0.0}  # 0: a sensor that is off
    clocks: dict[str, float] = {}
    for path, number, kind in re.findall(r"^(/\S+) (-?\d+) ?(.*)$", sensors, re.M):
        core = re.search(r"/(cpu\d+)/cpufreq/", path)
        if core is not None:
            clocks[core[1]] = int(number) / 1e3
        elif not readings and -40_000 < int(number) < 200_000:
            temperatures[kind.strip() or path.split("/")[-2]] = int(number) / 1e3
    return {"temperature_c": temperatures, "clock_mhz": clocks}
