"""Time programs on an Android phone over adb, with executorch's `executor_runner`."""

from __future__ import annotations

import math
import secrets
import shlex
import statistics
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.runtime.hosts import android
from edgetune.runtime.hosts.place import Place, TimingRequest

if TYPE_CHECKING:
    from edgetune.runtime.run import Timing

WARM_UPS, RUNS = 3, 20  # of each batch, which is a new process
_BATCHES_OF_MEANS = 5  # if the runner prints only a mean
_WATCHED_SECONDS = 1.0
_MOST_BATCHES = 50
_FOLDER = "/data/local/tmp"
_RUNNER = "executor_runner"
_SECONDS, _BYTES_A_SECOND = 60.0, 1024 * 1024
_MACHINES = {3: "x86", 40: "armeabi-v7a", 62: "x86_64", 183: "arm64-v8a", 243: "riscv64"}  # of ELF -> of Android
_BUILD = (
    "build it from executorch with the Android NDK: cmake --preset android-arm64-v8a -DEXECUTORCH_PAL_DEFAULT=posix "
    "-DEXECUTORCH_ENABLE_LOGGING=ON -DEXECUTORCH_LOG_LEVEL=Info -DEXECUTORCH_BUILD_EXECUTOR_RUNNER=ON; then name it: "
    "--runner PATH"
)
_STATES = {
    "unauthorized": "unlock the phone and allow this computer on its screen",
    "offline": "plug it in again, or `adb reconnect`",
    "no permissions": "let your user open it: sudo apt-get install android-sdk-platform-tools-common, plug it in again",
    "recovery": "start Android on it",
    "sideload": "start Android on it",
    "bootloader": "start Android on it",
}


class Adb:
    """Times programs on a phone; a context with a temporary folder there."""

    records = False

    def __init__(self, place: Place, runner: Path | None, *, timeout_seconds: float = 900.0) -> None:
        if runner is None:
            raise EdgetuneError("adb needs ExecuTorch's executor_runner", action=_BUILD)
        self.place, self.runner, self.timeout_seconds = place, runner, timeout_seconds
        self.serial = self.model = self.folder = self.means = ""
        self._cores = 0

    def __enter__(self) -> Adb:
        machine = _machine(self.runner)
        self.serial = self._choose_phone()
        self.model = " ".join(filter(None, map(self._property, ("ro.product.manufacturer", "ro.product.model"))))
        takes = self._property("ro.product.cpu.abilist").split(",")
        if machine not in takes:
            raise EdgetuneError(
                "the runner is built for another processor", where=str(self.runner), got=machine, allowed=takes,
                action=_BUILD,
            )  # fmt: skip
        self._cores = int(self._shell("nproc").strip() or 0)
        folder = f"{_FOLDER}/edgetune-{secrets.token_hex(6)}"
        self._shell(f"mkdir {folder}")
        self.folder = folder
        try:
            self._push(self.runner, _RUNNER)
            self._shell(f"chmod 755 {folder}/{_RUNNER}")
        except BaseException as error:
            self.__exit__(type(error), error)
            raise
        return self

    def __exit__(self, *problem: object) -> None:
        folder, self.folder = self.folder, ""
        if not folder:
            return
        try:
            self._shell(f"rm -rf {folder}")
        except EdgetuneError as error:
            error.action = f"remove it when the phone is back: adb -s {self.serial} shell rm -rf {folder}"
            if len(problem) < 2 or problem[1] is None:
                raise
            if isinstance(problem[1], EdgetuneError):
                problem[1].action = "; ".join(filter(None, (problem[1].action, error.action)))

    @property
    def name(self) -> str:
        """The phone's make and its serial."""
        return f"{self.model or 'Android'} (adb:{self.serial})"

    @property
    def cores(self) -> int:
        """Cores that the shell may use there."""
        return self._cores

    def caveat(self, built_with: dict[str, str]) -> str:
        """Its inputs are ones, memory is that of the whole process, and other limits of the runner."""
        return "; ".join(filter(None, ("executor_runner: inputs are ones, memory is of the whole process", self.means)))

    @property
    def executorch(self) -> str:
        """Unknown: the runner does not print it."""
        return ""

    def time(self, request: TimingRequest) -> tuple[Timing, ...]:
        """Time one call in batches of 3 warm-ups and 20 runs; all inputs are ones."""
        from edgetune.runtime.run import State, Timing

        if request.language or len(request.calls) != 1:
            raise EdgetuneError(
                "executor_runner cannot run text-generation programs", action="time it over ssh, or on the host"
            )
        if request.record:
            action = "pass --layers with --on ssh://user@host or host, or without --on for the prediction alone"
            raise EdgetuneError("executor_runner does not record operators", where=self.name, action=action)
        request.check_threads(self.cores, self.name)
        path = request.path
        self._push(path, "model.pte")
        command = [f"./{_RUNNER}", "--model_path=model.pte", f"--cpu_threads={request.threads}"]
        if request.data is not None:
            self._push(request.data, "model.ptd")
            command.append("--data_path=model.ptd")
        first, runs, states = self._batches(command, path, request.seconds)
        watched = self._measure_memory(command, path, statistics.median(runs), request.energy)
        timing = Timing(
            threads=request.threads,
            load_ms=first.load_ms,
            first_ms=first.runs_ms[0] if first.runs_ms else first.total_ms / first.runs,
            latencies_ms=tuple(runs),
            warm_up_runs=WARM_UPS * (len(states) - 1),
            empty_memory_mib=0.0,
            states=tuple(State.model_validate(state) for state in states),
            **watched,
        )
        self._shell(f"rm -f {self.folder}/model.pte {self.folder}/model.ptd")
        return (timing,)

    def _batches(
        self, command: list[str], path: Path, seconds: float
    ) -> tuple[android.Log, list[float], list[dict[str, Any]]]:
        """The first batch's log, the milliseconds of all runs but warm-ups, and the phone's state around each batch."""
        states = [self._state()]
        runs: list[float] = []
        logs: list[android.Log] = []
        self.means = ""
        while len(logs) < _MOST_BATCHES and (not logs or sum(log.total_ms for log in logs) < seconds * 1e3):
            log = self._execute(command, WARM_UPS + RUNS, path)
            states.append(self._state())
            logs.append(log)
            runs += log.runs_ms[WARM_UPS:] or [log.total_ms / log.runs]
        while not logs[0].runs_ms and len(logs) < _BATCHES_OF_MEANS:
            log = self._execute(command, WARM_UPS + RUNS, path)
            logs.append(log)
            runs.append(log.total_ms / log.runs)
        if not logs[0].runs_ms:
            self.means = (
                f"each time is a mean of {WARM_UPS + RUNS} runs, the first ones too: all that this runner prints"
            )
        return logs[0], runs, states

    def _execute(self, command: list[str], executions: int, path: Path) -> android.Log:
        words = shlex.join([*command, f"--num_executions={executions}"])
        done = self._run(["shell", f"cd {self.folder} && {words} 2>&1"], self.timeout_seconds)
        if done.returncode != 0:
            raise self._runner_error(done.returncode, done.stdout, path)
        log = android.parse_log(done.stdout)
        if log is None or log.runs != executions:
            message = "the runner ran, but logged no times"
            raise EdgetuneError(message, where=str(self.runner), action=_BUILD, exit_code=Exit.EXPORT)
        return log

    def _measure_memory(self, command: list[str], path: Path, latency_ms: float, energy: bool) -> dict[str, Any]:
        """Peak memory, and energy of one run, from a longer batch that is observed instead of timed."""
        executions = max(WARM_UPS + RUNS, math.ceil(_WATCHED_SECONDS * 1e3 / latency_ms))
        words = shlex.join([*command, f"--num_executions={executions}"])
        done = self._run(["shell", android.watch_script(self.folder, words)], self.timeout_seconds)
        if done.returncode != 0:
            raise self._runner_error(done.returncode, done.stdout, path)
        peak_mib = android.peak_mib(done.stdout)
        if peak_mib is None:
            raise EdgetuneError("the memory of the runner could not be read", where=self.name, exit_code=Exit.EXPORT)
        measurement: dict[str, Any] = {"peak_memory_mib": peak_mib}
        if energy:
            watts, note = android.power_w(done.stdout, self._shell("dumpsys battery", may_fail=True))
            measurement |= {"energy_mj": watts * latency_ms if watts is not None else None, "energy_note": note}
        return measurement

    def _state(self) -> dict[str, Any]:
        return android.parse_state(self._shell("dumpsys thermalservice", may_fail=True), self._shell(android.SENSORS))

    def _property(self, name: str) -> str:
        return self._shell(f"getprop {name}").strip()

    def _push(self, source: Path, name: str) -> None:
        size = source.stat().st_size
        done = self._run(["push", str(source.resolve()), f"{self.folder}/{name}"], _SECONDS + size / _BYTES_A_SECOND)
        if done.returncode == 0:
            return
        if "No space left" in done.stdout:
            message = f"no room is left for {size / 2**20:.1f} MiB in {_FOLDER}"
            raise EdgetuneError(message, where=self.name, action="free some on the phone")
        raise self._adb_error(f"{source} could not be copied there", done.stdout)

    def _shell(self, script: str, *, may_fail: bool = False) -> str:
        done = self._run(["shell", script], _SECONDS)
        if done.returncode != 0 and not may_fail:
            raise self._adb_error(f"`{script}` ended with code {done.returncode}", done.stdout)
        return done.stdout if done.returncode == 0 else ""

    def _run(self, arguments: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
        """Run adb on the chosen phone. Errors are part of its output."""
        named = ["-s", self.serial] if self.serial else []
        try:
            return subprocess.run(
                ["adb", *named, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                timeout=seconds, encoding="utf-8", errors="replace", check=False,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise EdgetuneError("adb is not installed", action="sudo apt-get install adb") from error
        except subprocess.TimeoutExpired as error:
            message = f"`adb {arguments[0]}` took more than {seconds:.0f} s"
            raise EdgetuneError(
                message, where=self.serial, action="see what else runs on the phone", exit_code=Exit.EXPORT
            ) from error

    def _choose_phone(self) -> str:
        """The serial of the phone: the requested one, or the only one."""
        done = self._run(["devices"], _SECONDS)
        phones = android.parse_devices(done.stdout)
        if self.place.serial and self.place.serial not in phones:
            message, action = "no such phone on adb", "`adb devices` lists them; plug it in and allow USB debugging"
            raise EdgetuneError(message, got=self.place.serial, allowed=phones, action=action)
        if not phones:
            action = "plug a phone in and allow USB debugging in its developer options"
            raise EdgetuneError("adb found no phone", action=action)
        if not self.place.serial and len(phones) > 1:
            first = next(iter(phones))
            raise EdgetuneError("adb found several phones", got=list(phones), action=f"name one: --on adb:{first}")
        serial = self.place.serial or next(iter(phones))
        state = phones[serial]
        if state != "device":
            action = next((does for name, does in _STATES.items() if state.startswith(name)), "`adb devices` says more")
            raise EdgetuneError(f"the phone is not ready: {state}", where=serial, action=action)
        return serial

    def _adb_error(self, message: str, output: str) -> EdgetuneError:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        gone = "not found" in output and "device" in output
        action = "plug the phone in again" if gone else "try it by hand with adb shell"
        return EdgetuneError(f"{message}: {' '.join(lines[-3:])[:500]}", where=self.serial, action=action)

    def _runner_error(self, code: int, output: str, path: Path) -> EdgetuneError:
        """The error for a program that the runner did not run."""
        error = self._adb_error(f"{path} does not run there (code {code})", output)
        error.exit_code = Exit.EXPORT
        error.action = "build the runner from the executorch that the program was made with, with its backend"
        if code == 137:
            error.what = f"{path} was killed there, most likely because memory ran out"
            error.action = "close other apps, or use a smaller program"
        elif "unknown command line flag" in output:
            error.action = f"this runner is too old; {_BUILD}"
        return error


def _machine(runner: Path) -> str:
    """The processor that the binary is for, as Android names it."""
    try:
        with runner.open("rb") as file:
            head = file.read(20)
    except OSError as error:
        raise EdgetuneError(f"the runner cannot be read: {error.strerror}", got=str(runner), action=_BUILD) from error
    if len(head) < 20 or head[:4] != b"\x7fELF":
        raise EdgetuneError("the runner is not an Android program", got=str(runner), action=_BUILD)
    number = struct.unpack_from("<H", head, 18)[0]
    return _MACHINES.get(number, f"machine {number}")
