"""Timing on this host, how sure its numbers are, and what the machine says of itself: from files as they look."""

from __future__ import annotations

import json
import math
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgetune.core.ledger import Measured
from edgetune.runtime import measure
from edgetune.runtime.clock import machine, power, runs
from edgetune.runtime.run import State, Timing


def timing(latencies_ms: list[float], **known: object) -> Timing:
    return Timing.model_validate(
        {
            "threads": 2, "load_ms": 5.0, "first_ms": 9.0, "latencies_ms": latencies_ms, "warm_up_runs": 1,
            "peak_memory_mib": 50.0, "empty_memory_mib": 40.0, **known,
        }
    )  # fmt: skip


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    return folder


# how sure the median is


@pytest.mark.parametrize("runs_of_each", [10, 20, 60, 400])
def test_the_noise_covers_the_true_median(runs_of_each: int) -> None:
    draw, inside = random.Random(0), 0
    for _ in range(400):
        latencies = [10 * math.exp(draw.gauss(0, 0.1)) for _ in range(runs_of_each)]  # its median is 10
        noise = measure.noise_pct(latencies)
        assert noise is not None
        found = measure.summarize_timing(timing(latencies), 1).latency_ms
        inside += abs(found - 10) <= found * noise / 100
    assert 0.92 <= inside / 400 <= 0.985


def test_noise_shrinks_with_runs_and_has_no_unit() -> None:
    draw = random.Random(1)
    latencies = [10 * math.exp(draw.gauss(0, 0.1)) for _ in range(10_000)]
    few = [measure.noise_pct(latencies[start : start + 40]) or 0.0 for start in range(0, 4000, 40)]
    many = measure.noise_pct(latencies)
    assert many is not None
    assert many < 0.2 * sorted(few)[50]
    assert measure.noise_pct([1000 * ms for ms in latencies]) == pytest.approx(many)
    assert measure.noise_pct([5.0] * 50) == 0
    assert measure.noise_pct([5.0] * 9) is None


def test_one_burst_does_not_pass_for_noise_and_a_drift_does_not_hide() -> None:
    calm = [10.0 + 0.01 * (i % 7) for i in range(200)]
    burst = [*calm[:60], *(40.0 for _ in range(5)), *calm[65:]]
    assert (measure.noise_pct(burst) or 0) < 0.5
    assert measure.summarize_timing(timing(burst), 1).note == ""
    slower = [10.0 * (1 + 0.4 * i / 200) for i in range(200)]
    found = measure.summarize_timing(timing(slower), 1)
    assert found.drift_pct == pytest.approx(100 * 0.4 * (2 / 3) / 1.2, rel=0.02)
    assert "the last third of the runs was 22 % slower than the first" in found.note
    assert "faster than the first" in measure.summarize_timing(timing(slower[::-1]), 1).note


def test_a_noisy_run_says_so() -> None:
    draw = random.Random(2)
    found = measure.summarize_timing(timing([draw.choice((10.0, 13.0, 17.0)) for _ in range(20)]), 1)
    assert found.noise_pct is not None
    assert found.noise_pct > measure.NOISY_PCT
    assert f"noisy: the median is certain to about {found.noise_pct:.0f} % only" in found.note


def test_heat_and_a_falling_clock_are_said() -> None:
    states = [
        State(temperature_c={"soc": 45.0, "gpu": 44.0}, clock_mhz={"cpu0": 1800.0, "cpu4": 2400.0}),
        State(temperature_c={"soc": 78.0, "gpu": 50.0}, clock_mhz={"cpu0": 1800.0, "cpu4": 1500.0}),
        State(temperature_c={"soc": 81.0, "gpu": 52.0}, clock_mhz={"cpu0": 1800.0, "cpu4": 2400.0}),
    ]
    hot = measure.summarize_timing(timing([1.0] * 20, states=states), 1)
    assert (hot.temperature_c, hot.clock_mhz) == ((45.0, 81.0), (2400.0, 1800.0))
    assert "it warmed from 45 to 81 degrees Celsius" in hot.note
    assert "the clock fell from 2400 to 1800 MHz: throttled" in hot.note
    nothing = measure.summarize_timing(timing([1.0] * 20, states=[State(), State()]), 1)
    assert (nothing.temperature_c, nothing.clock_mhz, nothing.note) == (None, None, "")


def test_an_older_ledger_still_reads() -> None:
    old = {
        "device": "this host", "latency_ms": 1.0, "latency_p10_ms": 0.9, "latency_p90_ms": 1.1, "load_ms": 5.0,
        "peak_memory_mib": 3.0, "runs": 10, "threads": 1,
    }  # fmt: skip
    assert Measured.model_validate_json(json.dumps(old)).energy_mj is None


# what the machine says


def test_the_fastest_cores_are_taken_and_second_threads_last(tmp_path: Path) -> None:
    phone = written(
        tmp_path / "phone",
        {f"devices/system/cpu/cpu{i}/cpu_capacity": str(c) for i, c in enumerate((250, 250, 600, 600, 1024))},
    )
    assert machine.best_cores(3, (0, 1, 2, 3, 4), phone) == (2, 3, 4)
    assert machine.best_cores(2, (0, 1, 2), phone) == (0, 2)
    siblings = ("0,2", "1,3", "0,2", "1,3")
    laptop = written(
        tmp_path / "laptop",
        {f"devices/system/cpu/cpu{i}/topology/thread_siblings_list": s for i, s in enumerate(siblings)},
    )
    assert machine.best_cores(2, (0, 1, 2, 3), laptop) == (0, 1)
    assert machine.best_cores(3, (0, 1, 2, 3), laptop) == (0, 1, 2)
    assert machine.best_cores(9, (0, 1), tmp_path / "none") == (0, 1)


def test_cores_are_those_that_the_process_may_use_within_its_quota(tmp_path: Path) -> None:
    allowed = len(machine.allowed_cores())
    assert machine.usable_cores(tmp_path) == allowed  # no quota is named
    limit = tmp_path / "fs" / "cgroup" / "cpu.max"
    limit.parent.mkdir(parents=True)
    for text, cores in (
        ("max 100000", allowed),
        ("100000 100000", 1),
        ("150000 100000", min(2, allowed)),
        ("20000 100000", 1),
        (f"{(allowed + 8) * 100000} 100000", allowed),
    ):
        limit.write_text(text + "\n", encoding="ascii")
        assert machine.usable_cores(tmp_path) == cores, text


def test_state_and_facts_as_files_have_them(tmp_path: Path) -> None:
    sys_folder = written(
        tmp_path / "sys",
        {
            "class/thermal/thermal_zone0/temp": "51250",
            "class/thermal/thermal_zone0/type": "cpu-thermal",
            "class/thermal/thermal_zone1/temp": "-274000",  # a sensor that is off
            "class/thermal/thermal_zone2/temp": "40000",
            "class/thermal/thermal_zone2/type": "cpu-thermal",
            "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "2400000",
            "devices/system/cpu/cpufreq/boost": "1",
        },
    )
    assert machine.state(sys_folder) == {
        "temperature_c": {"cpu-thermal": 51.25, "cpu-thermal thermal_zone2": 40.0},
        "clock_mhz": {"cpu0": 2400.0},
    }
    assert machine.state(tmp_path / "none") == {"temperature_c": {}, "clock_mhz": {}}
    board = written(tmp_path / "board", {"device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"})
    assert machine.facts(board)["model"] == "Raspberry Pi 5 Model B Rev 1.0"
    server = written(tmp_path / "server", {"cpuinfo": "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n"})
    assert machine.facts(server)["model"] == "Some CPU @ 2 GHz"


def test_the_thermal_protocol_is_batches_of_three_and_twenty() -> None:
    done: list[int] = []

    def once() -> float:
        done.append(len(done))
        return float(len(done))

    found = runs.time_in_batches(once, {"seconds": 0, "batch_warm_ups": 3, "batch_runs": 20})
    assert len(done) == 24  # the first, then one batch
    assert found["first_ms"] == 1
    assert found["latencies_ms"] == list(range(5, 25))
    assert found["warm_up_runs"] == 3
    assert len(found["states"]) == 2


# energy


def once_of(effect: Callable[[], object]) -> Callable[[], float]:
    def once() -> float:
        effect()
        return 1.0

    return once


RAPL = {
    "class/powercap/intel-rapl:0/name": "package-0",
    "class/powercap/intel-rapl:0/energy_uj": "262140000000",
    "class/powercap/intel-rapl:0/max_energy_range_uj": "262143328850",
    "class/powercap/intel-rapl:0:0/name": "core",
    "class/powercap/intel-rapl:0:0/energy_uj": "100",
    "class/powercap/intel-rapl:0:1/name": "dram",
    "class/powercap/intel-rapl:0:1/energy_uj": "500000",
    "class/powercap/intel-rapl:1/name": "psys",
    "class/powercap/intel-rapl:1/energy_uj": "7",
    "class/powercap/intel-rapl-mmio:0/name": "package-0",
    "class/powercap/intel-rapl-mmio:0/energy_uj": "262140000000",
}


def test_rapl_counts_packages_and_memory_once_also_when_it_goes_round(tmp_path: Path) -> None:
    folder = written(tmp_path, RAPL)
    zones = power.rapl_zones(folder)
    assert [zone.name for zone in zones] == ["intel-rapl:0", "intel-rapl:0:1"]

    def spent() -> None:
        written(folder, {"class/powercap/intel-rapl:0/energy_uj": "6671150"})  # 10 J later, past the range
        written(folder, {"class/powercap/intel-rapl:0:1/energy_uj": "2500000"})  # 2 J

    found = power.energy(once_of(spent), 0, folder)
    assert found["energy_mj"] == pytest.approx(12_000)
    assert found["energy_note"] == "RAPL: package-0, dram, idle included, mean of 1 runs"
    stuck = power.energy(once_of(lambda: None), 0, folder)
    assert stuck == {"energy_mj": None, "energy_note": "RAPL: package-0, dram: the counters do not move"}


def test_counters_that_cannot_be_read_give_no_energy(tmp_path: Path) -> None:
    written(tmp_path, {**RAPL, "class/powercap/intel-rapl:0/energy_uj": ""})
    found = power.energy(once_of(lambda: None), 0, tmp_path)
    assert found["energy_mj"] is None
    assert found["energy_note"].endswith("intel-rapl:0/energy_uj can only be read by root")


# lines as tegrastats prints them on an Orin Nano, an AGX Orin and the first Nano
ORIN_NANO = (
    "11-23-2026 20:11:00 RAM 2458/7620MB (lfb 2x4MB) SWAP 0/3810MB (cached 0MB) CPU [12%@729,5%@729,off,off,3%@729,"
    "0%@729] EMC_FREQ 0%@2133 GR3D_FREQ 0%@[305] NVDEC off VIC_FREQ 115 cpu@48.6C soc2@47.9C tj@49.2C "
    "VDD_IN 4540mW/4496mW VDD_CPU_GPU_CV 492mW/480mW VDD_SOC 1423mW/1415mW"
)
AGX_ORIN = (
    "RAM 13983/62780MB (lfb 424x4MB) CPU [90%@2201,100%@2201] EMC_FREQ 1%@2133 GR3D_FREQ 14%@[407,407] APE 174 "
    "CV0@73.625C CPU@77.281C VDD_GPU_SOC 3150mW/2971mW VDD_CPU_CV 14312mW/12415mW VIN_SYS_5V0 4968mW/5048mW "
    "VDDQ_VDD2_1V8AO 1091mW/1091mW"
)
NANO = (
    "RAM 1201/3956MB (lfb 330x4MB) SWAP 0/1978MB (cached 0MB) IRAM 0/252kB(lfb 252kB) CPU [14%@1036,8%@1036,4%@1036,"
    "3%@1036] EMC_FREQ 0% GR3D_FREQ 0% PLL@27C CPU@29.5C PMIC@100C GPU@29C AO@36C thermal@29C POM_5V_IN 2053/2100 "
    "POM_5V_GPU 40/40 POM_5V_CPU 483/500"
)


def test_tegrastats_of_three_boards() -> None:
    assert power.module_w(ORIN_NANO) == (4.54, "VDD_IN")
    assert power.module_w(NANO) == (2.053, "POM_5V_IN")
    watts, rails = power.module_w(AGX_ORIN) or (0.0, "")
    assert (watts, rails) == (pytest.approx(3.15 + 14.312 + 4.968), "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0")
    assert power.module_w("RAM 1/2MB VDD_SOC 100mW/100mW") is None  # a part is not the module
    assert power.module_w("") is None


def test_tegrastats_is_run_beside_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = tmp_path / "printed"
    script = tmp_path / "tegrastats"  # as the real one: it prints until it is ended
    script.write_text(f"#!/bin/sh\n[ $1 = --interval ] || exit 1\nfor i in 1 2 3 4 5 6; do echo '{ORIN_NANO}'; done\n"
                      f"touch {printed}\nexec {sys.executable} -c 'import signal; signal.pause()'\n")  # fmt: skip
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def until_printed() -> None:
        while not printed.exists():
            pass

    found = power.energy(once_of(until_printed), 0, tmp_path)
    assert found["energy_note"] == "tegrastats: VDD_IN, idle included, mean of 1 runs"
    assert found["energy_mj"] > 0
    script.write_text("#!/bin/sh\nexit 1\n")
    nothing = power.energy(once_of(lambda: None), 0, tmp_path)
    assert nothing == {
        "energy_mj": None,
        "energy_note": "tegrastats printed the module's power 0 times, 5 are needed",
    }


def battery_in(folder: Path, **changed: str) -> Path:
    files = {"type": "Battery", "status": "Discharging", "current_now": "812000", "voltage_now": "11580000"} | changed
    return written(folder, {f"class/power_supply/BAT0/{name}": text for name, text in files.items()})


def test_the_battery_of_a_laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no tegrastats
    meter, why = power.battery(battery_in(tmp_path / "a"))
    assert why == ""
    assert isinstance(meter, power.Battery)
    meter.start()
    for _ in range(5):
        meter.next = 0.0
        meter.tick()
    joules, note = meter.stop(2.0)
    assert joules == pytest.approx(2 * 0.812 * 11.58)
    assert note == "battery BAT0: the whole device"
    meter.start()
    assert meter.stop(2.0) == (None, "the battery was read 0 times, 5 are needed")
    assert power.battery(battery_in(tmp_path / "b", power_now="9400000"))[0] is not None


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"status": "Charging"}, "not discharging (Charging)"),
        ({"status": "Full"}, "not discharging (Full)"),
        ({"current_now": "812", "voltage_now": "11580"}, "its units are not the kernel's"),
        ({"current_now": "0"}, "its units are not the kernel's"),
        ({"current_now": ""}, "does not print its current"),
        ({"type": "Mains"}, "neither RAPL nor tegrastats nor a battery is here"),
        ({"scope": "Device"}, "neither RAPL nor tegrastats nor a battery is here"),
    ],
)
def test_a_battery_that_tells_nothing_gives_no_energy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], why: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = power.energy(once_of(lambda: None), 0, battery_in(tmp_path / "a", **changed))
    assert found["energy_mj"] is None
    assert why in found["energy_note"]
