"""Time programs over ssh: on a Raspberry Pi, a Jetson, or any Linux with the runtime."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import tempfile
import zipfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.runtime.hosts.connection import NO_SPACE, Connection, shell_words
from edgetune.runtime.hosts.place import Place, TimingRequest

if TYPE_CHECKING:
    from edgetune.runtime.run import Timing

WARM_UPS, RUNS = 3, 20  # of each batch
_CLOCK = "clock.pyz"
_RESULT = "edgetune-result:"
_ENERGY_SECONDS = 2.0
_MAIN = "import sys\nfrom clock.__main__ import main\nsys.exit(main())\n"
_KILLED = {
    signal.SIGKILL: ("killed, most likely because memory ran out", "close other programs there, or use a smaller one"),
    signal.SIGILL: ("ended by an instruction that its processor lacks", "install wheels built for that processor"),
}


def clock_zip() -> bytes:
    """The stopwatch as one file that any Python runs: a zip of `edgetune.runtime.clock`."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__main__.py", _MAIN)
        for file in sorted(resources.files("edgetune.runtime.clock").iterdir(), key=lambda file: file.name):
            if file.name.endswith(".py"):
                archive.writestr(f"clock/{file.name}", file.read_bytes())
    return made.getvalue()


def _pack_request(request: dict[str, Any], calls: Sequence[tuple[Tensor, ...]]) -> bytes:
    """The request to the stopwatch as one zip, since each file would cost a round trip."""
    from edgetune.runtime.run import write_request

    made = io.BytesIO()
    with tempfile.TemporaryDirectory(prefix="edgetune-") as name, zipfile.ZipFile(made, "w") as archive:
        write_request(Path(name), request, calls)
        for file in Path(name).iterdir():
            archive.write(file, file.name)
    return made.getvalue()


class Ssh:
    """Times programs on another machine; a context that keeps one connection.

    `python`: the Python there, with executorch installed: a name, or a path from that user's home. `timeout_seconds`:
    limit for one program.
    """

    records = True

    def __init__(self, place: Place, *, python: str = "python3", timeout_seconds: float = 900.0) -> None:
        self.place = place
        self.python = python.removeprefix("~/")  # a command begins at home
        self.timeout_seconds = timeout_seconds
        self.connection = Connection(place)
        self.facts: dict[str, Any] = {}
        self.versions: dict[str, str] = {}
        self._jobs = 0

    def __enter__(self) -> Ssh:
        self.connection.__enter__()
        try:
            self.connection.push(clock_zip(), _CLOCK)
            answer = self._ask({"check": True}, [])
            self.facts, self.versions = answer["facts"], answer["versions"]
        except BaseException:
            self.connection.__exit__()
            raise
        return self

    def __exit__(self, *problem: object) -> None:
        self.connection.__exit__(*problem)

    @property
    def name(self) -> str:
        """User, host and model of the machine."""
        model = self.facts.get("model") or self.facts.get("machine")
        return f"{self.place} ({model})" if model else str(self.place)

    @property
    def cores(self) -> int:
        """Cores that a program may use there."""
        return int(self.facts["cores"])

    @property
    def executorch(self) -> str:
        """Its version there."""
        return self.versions.get("executorch", "")

    def time(self, request: TimingRequest) -> tuple[Timing, ...]:
        """Time each call there by the thermal protocol: batches of 3 warm-ups and 20 runs."""
        from edgetune.runtime.run import Timing

        request.check_threads(self.cores, str(self.place))
        settings = {
            "threads": request.threads,
            "seconds": request.seconds,
            "batch_warm_ups": WARM_UPS,
            "batch_runs": RUNS,
            "language": request.language,
            "record": request.record,
            "energy_seconds": _ENERGY_SECONDS if request.energy else 0.0,
        }
        answer = self._ask(settings, request.calls, request.path, request.data)
        return tuple(Timing.model_validate(call) for call in answer["calls"])

    def caveat(self, built_with: dict[str, str]) -> str:
        """A note if the executorch there is not the one that the program was made with."""
        there, here = self.executorch, built_with.get("executorch")
        return f"made with executorch {here}, run with {there}" if here and there != here else ""

    def _ask(
        self,
        request: dict[str, Any],
        calls: Sequence[tuple[Tensor, ...]],
        path: Path | None = None,
        data: Path | None = None,
    ) -> dict[str, Any]:
        """The stopwatch's answer, from a new process there; the files pushed for it are removed afterwards."""
        self._jobs += 1
        folder = f"{self._jobs}"
        try:
            for file, source in (("model.pte", path), ("model.ptd", data)):
                if source is not None:
                    self.connection.push(source, f"{folder}/{file}")
            named = {"path": "model.pte", "data": "model.ptd" if data is not None else None}
            self.connection.push(_pack_request({**request, **named}, calls), f"{folder}/job.zip")
            return self._run_clock(folder, path)
        except EdgetuneError:
            with contextlib.suppress(EdgetuneError):  # the line may be cut; the folder goes away with it
                self.connection.remove(folder)
            raise

    def _run_clock(self, folder: str, path: Path | None) -> dict[str, Any]:
        there = f"{self.connection.folder}/{folder}"
        command = shell_words([self.python, f"{self.connection.folder}/{_CLOCK}", there, "--leashed"])
        script = (
            f"TMPDIR={shell_words([there])} {command}; c=$?; "  # torch leaves folders where that is
            f"echo; echo {_RESULT}; cat {shell_words([f'{there}/result.json'])} 2>/dev/null; "
            f"rm -rf -- {shell_words([there])}; exit $c"
        )
        late = Exit.EXPORT if path is not None else Exit.USAGE
        done = self.connection.run(script, seconds=self.timeout_seconds, hold=True, on_timeout=late)
        answer = done.stdout.rpartition(_RESULT.encode())[2].strip() if done.returncode == 0 else b""
        result: dict[str, Any] | None = json.loads(answer) if answer else None
        if result is None or "error" in result:
            raise self._no_answer_error(done.returncode, done.stderr.decode("utf-8", "replace"), result, path)
        return result

    def _no_answer_error(
        self, code: int, output: str, result: dict[str, Any] | None, path: Path | None
    ) -> EdgetuneError:
        """Why there is no answer, and the next action."""
        if result is not None:
            return self._remote_error(result, path)
        message, action, exit_code = _reason(code, output, self.python)
        error = self.connection.remote_error(message, output)
        error.action, error.exit_code = action, exit_code
        return error

    def _remote_error(self, result: dict[str, Any], path: Path | None) -> EdgetuneError:
        """The error that the other side reported."""
        needed = _required_versions()
        wants = " ".join(f'"{name}=={version}"' for name, version in needed.items())
        if result.get("kind") == "missing":
            return EdgetuneError(
                f"its {self.python} (Python {result['facts']['python']}) has no runtime: {result['error']}",
                where=str(self.place),
                action=f"there: python3 -m venv edgetune && edgetune/bin/pip install {wants}, with Python 3.10 to "
                "3.14 (of torch, the CPU build of pytorch.org is enough); then add --python edgetune/bin/python",
            )
        there, here = result["versions"].get("executorch"), needed.get("executorch")
        other = f"; executorch there is {there}, here {here}" if there != here else ""
        return EdgetuneError(
            f"{path} does not run there{other}: {result['error']}",
            where=str(self.place),
            action=f"there: {self.python} -m pip install {wants}" if other else "try it on this host: --on host",
            exit_code=Exit.EXPORT,
        )


def _reason(code: int, output: str, python: str) -> tuple[str, str, Exit]:
    """The meaning of a shell's exit code, the next action, and our exit code."""
    if code == 127:
        action = "install Python 3.10 to 3.14 there, or name yours: --python PATH"
        return f"there is no {python!r}", action, Exit.USAGE
    if code == 126:
        return f"{python!r} cannot be run", "name another Python there: --python PATH", Exit.USAGE
    if NO_SPACE in output:
        return "its disk is full", "free some there, or let TMPDIR there name a folder on a larger disk", Exit.USAGE
    for number, (message, action) in _KILLED.items():
        if code == 128 + number:
            return f"the program was {message}", action, Exit.EXPORT
    if code > 128:
        return f"the program was ended by signal {code - 128}", "try it on this host: --on host", Exit.EXPORT
    return f"the stopwatch ended with code {code}", "see what it says above", Exit.EXPORT


def _required_versions() -> dict[str, str]:
    """The versions here, without the build that torch's names."""
    from edgetune.runtime.clock.runs import versions

    return {name: version.partition("+")[0] for name, version in versions().items()}
