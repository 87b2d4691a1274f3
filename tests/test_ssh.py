"""Programs timed over ssh, against a real sshd that listens on the loopback address only."""

from __future__ import annotations

import contextlib
import getpass
import importlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from edgetune.cli.main import main
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.export import Artifact, export
from edgetune.profile import calibrate
from edgetune.profile.micro.program import Micro
from edgetune.runtime.hosts import connection, session, ssh
from edgetune.runtime.hosts.connection import Connection
from edgetune.runtime.hosts.place import Place, TimingRequest, parse_place

UNPACKED = Path(os.environ.get("EDGETUNE_DATA", ".venv/share")) / "sshd"  # tests/sshd.sh puts it there without root
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:{UNPACKED}/usr/sbin")
needs_sshd = pytest.mark.skipif(SSHD is None or shutil.which("ssh") is None, reason="apt-get install openssh-server")


@dataclass(frozen=True)
class Server:
    place: Place
    folder: Path
    temporary: Path  # where the other side makes its folders

    @property
    def url(self) -> str:
        return f"ssh://{self.place.user}@{self.place.host}:{self.place.port}"


def key_in(folder: Path, name: str) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    return folder / name


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    assert SSHD is not None
    folder = tmp_path_factory.mktemp("sshd")
    temporary = folder / "a disk's folder"  # a name that a shell would take apart
    temporary.mkdir()
    own, key, port = key_in(folder, "host_key"), key_in(folder, "key"), free_port()
    shutil.copy(key.with_suffix(".pub"), folder / "authorized")
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {own}\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
        f'AuthorizedKeysFile {folder / "authorized"}\nSetEnv "TMPDIR={temporary}"\n'
    )
    said = subprocess.run([SSHD, "-V"], capture_output=True, text=True, check=False).stderr
    version = re.search(r"OpenSSH_(\d+)\.(\d+)", said)
    if version is not None and (int(version[1]), int(version[2])) >= (9, 8):  # else a failed login bars the next ones
        with (folder / "sshd_config").open("a") as file:
            file.write("PerSourcePenalties no\n")
    public = own.with_suffix(".pub").read_text()
    (folder / "known").write_text(f"[127.0.0.1]:{port} {public}")
    if os.getuid() == 0:  # sshd as root wants this folder, which Debian's service makes
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    command = [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")]
    libraries = ":".join(map(str, UNPACKED.glob("**/lib/*-linux-gnu")))
    environment = {**os.environ, **({"LD_LIBRARY_PATH": libraries} if libraries else {})}
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stderr=log, env=environment) as daemon:
        try:
            wait_for_port(port, daemon)
            yield Server(Place("ssh", getpass.getuser(), "127.0.0.1", port), folder, temporary)
        finally:
            daemon.terminate()


def wait_for_port(port: int, daemon: subprocess.Popen[bytes]) -> None:
    while daemon.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
    raise AssertionError(f"sshd ended with {daemon.returncode}")


def configured(folder: Path, server: Server, key: str = "key", known: str = "known") -> str:
    """A folder for PATH whose `ssh` is the real one, with the test's keys instead of the user's."""
    folder.mkdir(exist_ok=True)
    options = f"-F none -i {server.folder / key} -o IdentitiesOnly=yes -o UserKnownHostsFile={server.folder / known}"
    executable(folder / "ssh", f'exec {shutil.which("ssh", path=os.defpath)} {options} "$@"\n')
    return f"{folder}:{os.environ['PATH']}"


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def reached(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("PATH", configured(tmp_path / "bin", server))
    return server


def left_over(server: Server) -> list[str]:
    return [file.name for file in server.temporary.iterdir()]


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(x)
        return out


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("p") / "small.pte"
    return export(_Small().eval(), torch.randn(2, 16), path, target="xnnpack", one_row=True)


@needs_sshd
def test_a_program_is_timed_there_and_nothing_is_left(reached: Server, artifact: Artifact) -> None:
    with session.open_runner(reached.url, python=sys.executable) as machine:
        assert len(left_over(reached)) == 1
        (measured,) = session.measure_on(machine, artifact, threads=1, seconds=0.01, by_layer=True)
        assert set(measured.layers_ms) == {operator.module for operator in artifact.manifest.main.executed}
        assert measured.device.startswith(f"{getpass.getuser()}@127.0.0.1:{reached.place.port}")
        assert len(list((reached.temporary / left_over(reached)[0]).iterdir())) == 1  # the stopwatch alone
    assert left_over(reached) == []
    assert measured.runs % ssh.RUNS == 0
    assert measured.runs >= ssh.RUNS
    assert 0 < measured.latency_p10_ms <= measured.latency_ms <= measured.latency_p90_ms
    assert measured.first_ms is not None
    assert measured.noise_pct is not None
    assert len(measured.cores) == 1
    assert "executorch" not in measured.note  # the same version there as here


def test_this_host_is_timed_by_the_same_stopwatch(artifact: Artifact) -> None:
    with session.open_runner("host") as machine:
        (timing,) = machine.time(TimingRequest(artifact.path, [(torch.zeros(1, 16),)], 1, 0.01, energy=False))
    assert len(timing.latencies_ms) >= 10
    assert (timing.threads, len(timing.cores)) == (1, 1)
    assert timing.peak_memory_mib > timing.empty_memory_mib
    (measured,) = session.measure_on(session.Host(), artifact, threads=1, seconds=0.01)
    assert measured.device == "this host"
    assert len(measured.cores) == 1
    assert measured.noise_pct is not None
    assert measured.energy_note  # what was counted, or why nothing was


@needs_sshd
def test_many_programs_over_one_connection(reached: Server, artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "broken.pte").write_bytes(b"nothing")
    (tmp_path / "good.pte").write_bytes(artifact.path.read_bytes())
    wanted = [Micro(name, nn.Identity, lambda: (torch.zeros(1, 16),)) for name in ("broken", "good")]
    steps: list[tuple[str, int, int, str]] = []
    with session.open_runner(reached.url, python=sys.executable) as machine:
        clocked, (broken,) = calibrate.clock_on(
            machine, tmp_path, wanted, threads=1, seconds=0.01, progress=lambda *step: steps.append(step)
        )
    assert broken.startswith("broken: ")
    assert "does not run there" in broken
    assert [one.name for one in clocked] == ["good"]
    assert clocked[0].us > 0
    assert steps == [("time", 1, 2, ""), ("time", 2, 2, "")]
    assert left_over(reached) == []


@needs_sshd
def test_the_command_line(reached: Server, artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["profile", str(artifact.path), "--device", "pixel-8", "--on", reached.url, "--python", sys.executable]
    assert main([*asked, "--seconds", "0.01"]) == Exit.USAGE  # the Pixel's four threads
    told = capsys.readouterr()
    if os.cpu_count() == 2:
        assert "threads must be from 1 to the 2 cores there: got 4\n  next: pass --threads 2" in told.err
    assert main([*asked, "--seconds", "0.01", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    (device,) = [line for line in out.splitlines() if line.startswith("device ")]
    assert "Google Pixel 8" in device
    assert f"{getpass.getuser()}@127.0.0.1:{reached.place.port}" in device
    assert "\nnoise " in out
    assert "None" not in out
    assert left_over(reached) == []


def opened_with(server: Server, python: str | Path, timeout_seconds: float = 60.0) -> ssh.Ssh:
    return ssh.Ssh(server.place, python=str(python), timeout_seconds=timeout_seconds)


@needs_sshd
def test_what_is_missing_there_is_said_with_the_next_step(reached: Server, tmp_path: Path) -> None:
    empty = executable(tmp_path / "empty", f'exec {sys.executable} -I -S "$@"\n')  # without site-packages
    with (
        pytest.raises(EdgetuneError, match=r"has no runtime: .*executorch and torch not installed") as missing,
        opened_with(reached, empty),
    ):
        pass
    assert 'pip install "executorch==' in missing.value.action
    assert "+" not in missing.value.action
    assert "--python edgetune/bin/python" in missing.value.action
    with (
        pytest.raises(EdgetuneError, match="there is no 'no such; python'") as no_python,
        opened_with(reached, "no such; python"),
    ):
        pass
    assert "--python PATH" in no_python.value.action
    plain = tmp_path / "plain"
    plain.write_text("")
    with pytest.raises(EdgetuneError, match="cannot be run"), opened_with(reached, plain):
        pass
    assert left_over(reached) == []


@needs_sshd
def test_ends_of_a_program_are_told_apart(reached: Server, artifact: Artifact, tmp_path: Path) -> None:
    def answers(name: str, script: str) -> str:
        """A Python that does this instead of timing."""
        check = f'grep -q \'"check"\' "$2/job.zip" && exec {sys.executable} "$@"\n'
        return str(executable(tmp_path / name, check + script))

    for name, script, what in (
        ("killed", "kill -KILL $$", "killed, most likely because memory ran out"),
        ("illegal", "kill -ILL $$", "an instruction that its processor lacks"),
        ("aborted", "kill -ABRT $$", "ended by signal 6"),
        ("full", "echo 'cannot write: No space left on device' >&2; exit 1", "its disk is full"),
    ):
        with opened_with(reached, answers(name, script)) as machine, pytest.raises(EdgetuneError, match=what) as error:
            machine.time(TimingRequest(artifact.path, [(torch.zeros(1, 16),)], threads=1, seconds=0.01))
        assert error.value.action
    with opened_with(reached, answers("late", "cat >/dev/null"), 3.0) as machine, pytest.raises(EdgetuneError) as late:
        machine.time(TimingRequest(artifact.path, [(torch.zeros(1, 16),)], threads=1, seconds=0.01))
    assert "took more than 3 s" in str(late.value)
    assert late.value.exit_code == Exit.EXPORT
    assert left_over(reached) == []


@needs_sshd
def test_more_threads_than_cores_are_refused(reached: Server, artifact: Artifact) -> None:
    with opened_with(reached, sys.executable) as machine, pytest.raises(EdgetuneError, match="cores there"):
        machine.time(TimingRequest(artifact.path, [(torch.zeros(1, 16),)], threads=10_000, seconds=0.01))


@needs_sshd
def test_another_version_there_is_noted(reached: Server) -> None:
    with opened_with(reached, sys.executable) as machine:
        assert machine.caveat({"executorch": "0.7.0"}).startswith("made with executorch 0.7.0, run with ")


@needs_sshd
def test_a_full_disk_is_a_clear_error(reached: Server) -> None:
    with Connection(reached.place) as there:
        (Path(there.folder) / "full").symlink_to("/dev/full")
        with pytest.raises(EdgetuneError, match="no room is left") as error:
            there.push(b"some bytes", "full")
    assert "TMPDIR" in error.value.action
    assert left_over(reached) == []


@needs_sshd
def test_a_file_arrives_whole(reached: Server, tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096
    (tmp_path / "content").write_bytes(content)
    with Connection(reached.place) as there:
        there.push(tmp_path / "content", "inner/a b'c")
        assert (Path(there.folder) / "inner/a b'c").read_bytes() == content
        there.remove("inner")
        assert list(Path(there.folder).iterdir()) == []


@needs_sshd
def test_who_is_not_let_in_is_told_why(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key_in(server.folder, "stranger")
    (server.folder / "unknown").write_text("")
    other = (server.folder / "known").read_text().split()[:2]
    changed = (server.folder / "stranger.pub").read_text().split()[1]
    (server.folder / "changed").write_text(f"{' '.join(other)} {changed}\n")
    for name, key, known, what in (
        ("a", "stranger", "known", "does not accept a login without a password"),
        ("b", "key", "unknown", "its key is not known here"),
        ("c", "key", "changed", "its key is another one than before"),
    ):
        monkeypatch.setenv("PATH", configured(tmp_path / name, server, key, known))
        with pytest.raises(EdgetuneError, match=what) as error, Connection(server.place):
            pass
        assert "ssh" in error.value.action
        assert error.value.exit_code == Exit.USAGE


@needs_sshd
def test_nothing_listens(reached: Server) -> None:
    place = Place("ssh", reached.place.user, "127.0.0.1", free_port())
    with pytest.raises(EdgetuneError, match="nothing listens there"), Connection(place):
        pass


@needs_sshd
def test_an_interrupt_leaves_nothing(reached: Server) -> None:
    def interrupted() -> None:
        with Connection(reached.place) as there:
            assert Path(there.folder).is_dir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert left_over(reached) == []


@needs_sshd
def test_whoever_is_killed_leaves_nothing_either(reached: Server, tmp_path: Path) -> None:
    place = repr(reached.place)
    script = f"""
from edgetune.runtime.hosts.connection import Connection
from edgetune.runtime.hosts.place import Place
with Connection({place}) as there:
    print(there.folder, flush=True)
    there.run("cat >/dev/null", seconds=60, hold=True)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        folder = child.stdout.readline().strip()
        assert Path(folder).is_dir()
        os.kill(child.pid, signal.SIGKILL)
    with Connection(reached.place) as there:  # the other side removes it as soon as it sees its input end
        words = connection.shell_words(["test", "-e", folder])
        assert there.run(f"while {words}; do sleep 0.05; done", seconds=20).returncode == 0


def test_the_stopwatch_needs_nothing_of_ours(tmp_path: Path) -> None:
    (tmp_path / "clock.pyz").write_bytes(ssh.clock_zip())
    (tmp_path / "job").mkdir()
    (tmp_path / "job/request.json").write_text('{"check": true}')
    command = [sys.executable, "-I", "-S", str(tmp_path / "clock.pyz"), str(tmp_path / "job")]
    subprocess.run(command, check=True)
    assert '"kind": "missing"' in (tmp_path / "job/result.json").read_text()


@pytest.mark.parametrize(
    "on",
    [
        "ssh://-oProxyCommand=id", "ssh://pi@-oProxyCommand=id", "ssh://-l@host", "ssh://a b@host", "ssh://$(id)@host",
        "ssh://pi@host;id", "ssh://pi@host'", "ssh://pi@ho\nst", "ssh://pi@host:0", "ssh://pi@host:99999", "ssh://",
        "ssh://pi@host/path", "ssh://pi:secret@host", "adb:", "adb:-s", "adb:a b", "adb:a;b", "ftp://host", "",
    ],
)  # fmt: skip
def test_odd_places_are_refused(on: str) -> None:
    with pytest.raises(EdgetuneError, match="not a valid place to time a program"):
        parse_place(on)


def test_places() -> None:
    assert parse_place("host") == Place("host")
    assert parse_place("adb") == Place("adb")
    assert str(parse_place("adb:R5CT1234")) == "adb:R5CT1234"
    assert str(parse_place("ssh://raspberrypi")) == "raspberrypi"
    assert parse_place("ssh://pi@[fe80::1%eth0]:22").host == "fe80::1%eth0"


@needs_sshd
@pytest.mark.slow
def test_a_program_that_talks_is_timed_there(reached: Server, talking: Artifact) -> None:
    with session.open_runner(reached.url, python=sys.executable) as machine:
        token, piece = session.measure_on(machine, talking, threads=1, seconds=0.01)
    assert token.call == f"a token after {talking.language.prefill_tokens}"
    assert piece.call == f"{talking.language.prefill_tokens} tokens of a prompt"
    assert 0 < token.latency_ms < piece.latency_ms
    assert left_over(reached) == []
