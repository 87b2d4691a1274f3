"""The adb runner against a STAND-IN for adb (support/standin_adb.py): the protocol is checked, no phone was there."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from pathlib import Path

import pytest
import torch

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.runtime.hosts import android, session
from edgetune.runtime.hosts.adb import Adb
from edgetune.runtime.hosts.place import Place, TimingRequest
from edgetune.runtime.measure import summarize_timing

STANDIN = Path(__file__).parent / "support" / "standin_adb.py"
INPUTS = [(torch.ones(1, 4),)]
# what executor_runner of 2026 logs through posix.cpp, and what that of 2024 did
NEW = """\
echo 'I 00:00:00.000813 executorch:executor_runner.cpp:82] Model file model.pte is loaded.' >&2
echo 'I 00:00:00.004100 executorch:executor_runner.cpp:420] Model loaded in 3.250000 ms.' >&2
i=1; while [ $i -le $n ]; do
echo "I 00:00:00.010000 executorch:executor_runner.cpp:560] Iteration $i of $n: $((i < 4 ? 9 : 2)).500000 ms" >&2
i=$((i + 1)); done
echo "I 00:00:00.100000 executorch:executor_runner.cpp:570] Model executed successfully $n time(s) in 71.500000 ms." >&2
echo 'OutputX 0: tensor(sizes=[1, 4], [0., 0., 0., 0.])'
"""
OLD = """\
echo 'I 00:00:00.000813 executorch:executor_runner.cpp:73] Model file model.pte is loaded.' >&2
echo 'I 00:00:00.006500 executorch:executor_runner.cpp:131] Method loaded.' >&2
echo "I 00:00:00.100000 executorch:executor_runner.cpp:170] Model executed successfully $n time(s) in 46.000000 ms." >&2
"""
THERMAL = """\
IsStatusOverride: false
Thermal Status: 0
Cached temperatures:
	Temperature{mValue=99.0, mType=0, mName=AP, mStatus=0}
HAL Ready: true
Current temperatures from HAL:
	Temperature{mValue=25.6, mType=0, mName=AP, mStatus=0}
	Temperature{mValue=0.0, mType=4, mName=USB, mStatus=0}
	Temperature{mValue=23.8, mType=2, mName=BAT, mStatus=0}
Current cooling devices from HAL:
"""
BATTERY = """\
Current Battery Service state:
  AC powered: false
  USB powered: {usb}
  Wireless powered: false
  status: 3
  voltage: 4063
  temperature: 326
"""
# a runner that stays until it was looked at a few times
STAYS = "i=0; while [ $i -lt 8 ]; do sleep 0.1; i=$((i + 1)); done\n"
COUNT = 'for word; do case $word in --num_executions=*) n=${word#*=};; --cpu_threads=*) ;; --model_path=model.pte) ;; *) echo "ERROR: unknown command line flag" >&2; exit 1;; esac; done\n'  # noqa: E501


class Phone:
    """The stand-in's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "services").mkdir(parents=True)
        self.phones("R5CT1234\tdevice")
        self.service(
            "getprop",
            'case $1 in *manufacturer) echo EXAMPLE;; *model) echo "Stand-in 8";; *) echo arm64-v8a,armeabi-v7a;; esac',
        )
        self.service("nproc", "echo 8")
        self.service(
            "dumpsys",
            f"[ $1 = thermalservice ] && cat <<'E' || cat <<'F'\n{THERMAL}E\n{BATTERY.format(usb='true')}F",
        )
        self.runner(COUNT + "[ $n -gt 23 ] && " + "{ " + STAYS.replace("\n", "; ") + "}\n" + NEW)
        for path, text in {
            "sys/class/thermal/thermal_zone0/temp": "41000", "sys/class/thermal/thermal_zone0/type": "cpu-big",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1704000",
            "sys/devices/system/cpu/cpu7/cpufreq/scaling_cur_freq": "2914000",
            "sys/class/power_supply/battery/status": "Discharging",
            "sys/class/power_supply/battery/current_now": "-500000",
            "sys/class/power_supply/battery/voltage_now": "4000000",
        }.items():  # fmt: skip
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text + "\n")

    def phones(self, *lines: str) -> None:
        (self.folder / "phones").write_text("".join(f"{line}\n" for line in lines))

    def service(self, name: str, script: str) -> None:
        self.script(self.folder / "services" / name, script)

    def runner(self, script: str) -> None:
        self.script(self.folder / "runner", script)

    def script(self, path: Path, script: str) -> None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    @property
    def said(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "said").read_text().splitlines()]

    @property
    def left(self) -> list[Path]:
        return list((self.folder / "root").iterdir()) if (self.folder / "root").is_dir() else []


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Phone:
    made = Phone(tmp_path / "standin")
    (tmp_path / "bin").mkdir()
    made.script(tmp_path / "bin" / "adb", f'exec {sys.executable} -I {STANDIN} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("STANDIN", str(made.folder))
    return made


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    """The head of a program for arm64; the stand-in runs a script in its place."""
    path = tmp_path / "a runner"
    path.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 3, 183) + bytes(44))
    return path


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "it's a model.pte"
    path.write_bytes(b"a program")
    return path


def test_the_protocol_from_devices_to_clean_up(phone: Phone, binary: Path, program: Path) -> None:
    with session.open_runner("adb", runner=binary) as machine:
        assert machine.name == "EXAMPLE Stand-in 8 (adb:R5CT1234)"
        assert machine.cores == 8
        (timing,) = machine.time(TimingRequest(program, INPUTS, threads=4, seconds=0.1))
        found = summarize_timing(timing, 4, device=machine.name, note=machine.caveat({}))
    assert phone.left == []
    assert timing.latencies_ms == (2.5,) * 40  # two batches of 71.5 ms each make up the 100 asked for
    assert (timing.first_ms, timing.load_ms, timing.warm_up_runs) == (9.5, 3.25, 6)
    assert 0.1 < timing.peak_memory_mib < 100  # the memory of the shell that stands in
    assert timing.states[0].temperature_c == {"AP": 25.6, "BAT": 23.8}
    assert timing.states[-1].clock_mhz == {"cpu0": 1704.0, "cpu7": 2914.0}
    assert timing.energy_mj is None
    assert timing.energy_note == (
        "the phone is powered by USB, so its battery does not show the energy of a run: use adb over Wi-Fi"
    )
    assert "inputs are ones" in found.note
    verbs = [" ".join(words[2:3]) for words in phone.said]
    assert phone.said[0] == ["devices"]
    assert all(words[:2] == ["-s", "R5CT1234"] for words in phone.said[1:])
    assert verbs.count("push") == 2
    assert phone.said[-1][3].startswith("rm -rf /data/local/tmp/edgetune-")
    executed = [words[3] for words in phone.said if "--num_executions=23" in words[-1]]
    assert len(executed) == 2
    assert all("--cpu_threads=4" in script for script in executed)


def test_energy_where_the_battery_tells_it(phone: Phone, binary: Path, program: Path) -> None:
    phone.service("dumpsys", f"[ $1 = battery ] && cat <<'E'\n{BATTERY.format(usb='false')}E\ntrue")
    with session.open_runner("adb:R5CT1234", runner=binary) as machine:
        (timing,) = machine.time(TimingRequest(program, INPUTS, threads=1, seconds=0.01))
    assert timing.energy_mj == pytest.approx(2.0 * 2.5)  # 2 W for 2.5 ms
    assert "battery: the whole phone, idle included" in timing.energy_note
    assert timing.states[0].temperature_c == {"cpu-big": 41.0}  # no thermal service: the sensors


def test_a_runner_that_prints_a_mean_only(phone: Phone, binary: Path, program: Path) -> None:
    phone.runner(COUNT + "[ $n -gt 23 ] && " + "{ " + STAYS.replace("\n", "; ") + "}\n" + OLD)
    with session.open_runner("adb", runner=binary) as machine:
        (timing,) = machine.time(TimingRequest(program, INPUTS, threads=1, seconds=0.01))
        assert "each time is a mean of 23 runs" in machine.caveat({})
        with pytest.raises(EdgetuneError, match="does not record operators"):
            machine.time(TimingRequest(program, INPUTS, threads=1, seconds=0.01, record=True))
    assert timing.latencies_ms == (2.0,) * 5
    assert (timing.load_ms, timing.first_ms) == (6.5, 2.0)


@pytest.mark.parametrize(
    ("script", "what", "action"),
    [
        ("kill -KILL $$", "was killed there, most likely because memory ran out", "smaller program"),
        ("kill -ABRT $$", "does not run there", "with its backend"),
        ("echo \"ERROR: unknown command line flag 'cpu_threads'\"; exit 1", "does not run there", "too old"),
        ("true", "logged no times", "EXECUTORCH_PAL_DEFAULT=posix"),
    ],
)
def test_a_program_that_does_not_run(
    phone: Phone, binary: Path, program: Path, script: str, what: str, action: str
) -> None:
    phone.runner(script)
    with session.open_runner("adb", runner=binary) as machine, pytest.raises(EdgetuneError, match=what) as error:
        machine.time(TimingRequest(program, INPUTS, threads=1, seconds=0.01))
    assert action in error.value.action
    assert error.value.exit_code == Exit.EXPORT
    assert phone.left == []


def test_a_full_phone(phone: Phone, binary: Path) -> None:
    (phone.folder / "full").touch()
    with pytest.raises(EdgetuneError, match="no room is left"), session.open_runner("adb", runner=binary):
        pass
    assert phone.left == []


@pytest.mark.parametrize(
    ("phones", "on", "what"),
    [
        ((), "adb", "adb found no phone"),
        (("A1\tdevice", "B2\tdevice"), "adb", r"adb found several phones: got \['A1', 'B2'\]\n  next: .*--on adb:A1"),
        (("A1\tdevice",), "adb:C3", "no such phone on adb: got 'C3'; allowed: A1"),
        (("A1\tunauthorized",), "adb", "A1: the phone is not ready: unauthorized\n  next: unlock the phone"),
        (("A1\toffline",), "adb:A1", "not ready: offline\n  next: plug it in again"),
        (("A1\tno permissions (missing udev rules?); see [...]",), "adb", "next: let your user open it"),
    ],
)  # fmt: skip
def test_phones_that_are_not_ready(phone: Phone, binary: Path, phones: tuple[str, ...], on: str, what: str) -> None:
    phone.phones(*phones)
    with pytest.raises(EdgetuneError) as error, session.open_runner(on, runner=binary):
        pass
    assert re.search(what, str(error.value)), str(error.value)


def test_the_runner_is_looked_at_before_anything_is_sent(phone: Phone, tmp_path: Path, binary: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(binary.read_bytes()[:18] + struct.pack("<H", 62) + bytes(44))
    for path, what in ((other, "another processor: got 'x86_64'"), (STANDIN, "not an Android program")):
        with pytest.raises(EdgetuneError) as error, session.open_runner("adb", runner=path):
            pass
        assert what in str(error.value)
        assert "android-arm64-v8a" in error.value.action
    with pytest.raises(EdgetuneError, match="needs ExecuTorch's executor_runner"):
        session.open_runner("adb")
    with pytest.raises(EdgetuneError, match="cannot be read"), session.open_runner("adb", runner=tmp_path / "none"):
        pass
    with pytest.raises(EdgetuneError, match="--runner only applies to adb"):
        session.open_runner("host", runner=binary)
    with session.open_runner("adb", runner=binary) as machine:
        with pytest.raises(EdgetuneError, match="cannot run text-generation programs"):
            machine.time(TimingRequest(tmp_path / "x.pte", INPUTS, threads=1, seconds=1, language=True))
        with pytest.raises(EdgetuneError, match="from 1 to the 8 cores there"):
            machine.time(TimingRequest(tmp_path / "x.pte", INPUTS, threads=9, seconds=1))


def test_a_phone_that_goes_away_is_said_with_what_is_left_on_it(phone: Phone, binary: Path) -> None:
    machine = Adb(Place("adb"), binary)
    machine.__enter__()
    phone.phones()
    with pytest.raises(EdgetuneError, match="not found") as error:
        machine.__exit__(None, None, None)
    assert "adb -s R5CT1234 shell rm -rf /data/local/tmp/edgetune-" in error.value.action


def test_the_stand_in_lets_nothing_else_through(phone: Phone) -> None:
    machine = Adb(Place("adb", serial="R5CT1234"), STANDIN)
    machine.serial = "R5CT1234"
    for words in (["shell", "ls"], ["shell", "getprop", "ro.product.model"], ["reboot"], ["shell", "nproc; id"]):
        assert machine._run(words, 30).returncode == 64
    assert machine._run(["shell", "nproc"], 30).stdout == "8\n"


def test_what_is_printed_is_read() -> None:
    assert android.parse_log("nothing") is None
    assert android.peak_mib("VmHWM:\t  2048 kB\nVmHWM:\t  4096 kB\n") == 4.0
    assert android.peak_mib("battery x\n") is None
    few = android.power_w("battery Discharging -500000 4000000\n", "USB powered: false\n")
    assert few == (None, "the battery was read 1 times, 3 are needed")
    assert android.power_w("battery \n", "")[1] == "the battery cannot be read by adb's shell"
    milliamperes = "battery Discharging 500 4000\n" * 9  # some phones
    assert "its units are not the kernel's" in android.power_w(milliamperes, "")[1]
