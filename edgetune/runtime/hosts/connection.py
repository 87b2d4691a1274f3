"""One ssh connection, and a temporary folder on the other machine that is removed with it.

All commands share the connection of a keeper: a remote shell that creates the folder, waits for its input to end, and
removes the folder. Its input ends when we close it, when we are killed, and when the connection is lost.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.runtime.hosts.place import Place

_MARK = "edgetune-folder:"
_KEEP = (
    "trap '' HUP; "
    'd=$(mktemp -d "${TMPDIR:-/var/tmp}/edgetune-XXXXXXXXXX" || mktemp -d /tmp/edgetune-XXXXXXXXXX) || exit 73; '
    f'printf "{_MARK}%s\\n" "$d"; cat >/dev/null; rm -rf -- "$d"'
)
_FOLDER = re.compile(rf"{_MARK}(/[^\n]*/edgetune-[A-Za-z0-9]+)\n")
_SECONDS_TO_CONNECT = 20
_SECONDS_TO_END = 20.0
_BYTES_A_SECOND = 64 * 1024  # a connection slower than this counts as dead
_LONGEST_SOCKET = 70  # of 104 characters at most, ssh adds some of its own

# part of ssh's message, its meaning, and the next action
_REFUSED = (
    ("Could not resolve", "no machine has this name", "check the name, or give its address"),
    ("REMOTE HOST IDENTIFICATION", "its key is another one than before", "run `ssh {to}` yourself to see why"),
    ("Host key verification failed", "its key is not known here",
     "connect once by hand, `ssh {to}`, and compare the key it shows"),
    ("Permission denied", "it does not accept a login without a password", "copy your key there: `ssh-copy-id {to}`"),
    ("Too many authentication failures", "it takes none of the keys tried", "name the key in ~/.ssh/config"),
    ("Connection refused", "nothing listens there", "start sshd there, or name its port: ssh://user@host:port"),
    ("timed out", "it does not answer", "check that it is on and in this network"),
    ("No route to host", "it cannot be reached", "check that it is on and in this network"),
    ("Network is unreachable", "it cannot be reached", "check this machine's network"),
)  # fmt: skip
NO_SPACE = "No space left on device"


class Connection:
    """A context: connects on entering, and removes everything on the other machine on leaving."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.folder = ""
        self._ends = contextlib.ExitStack()
        self._socket = Path()

    def __enter__(self) -> Connection:
        try:
            self._open()
        except BaseException:
            self._ends.close()
            raise
        return self

    def __exit__(self, *problem: object) -> None:
        self._ends.close()

    def _open(self) -> None:
        base = tempfile.gettempdir()
        short = base if len(base) < _LONGEST_SOCKET else "/tmp"  # a socket's path has 104 characters at most
        sockets = self._ends.enter_context(tempfile.TemporaryDirectory(prefix="edgetune-ssh-", dir=short))
        self._socket = Path(sockets) / "s"
        errors: IO[bytes] = self._ends.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        keeper = self._start(_KEEP, master=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        self._ends.callback(_close_keeper, keeper)
        printed = _read_until(keeper, _MARK, _SECONDS_TO_CONNECT + 10)
        match = _FOLDER.search(printed)
        if match is None:
            errors.seek(0)
            errors_text = errors.read().decode("utf-8", "replace")
            code = keeper.poll()
            raise self.ssh_error(code if code is not None else 255, errors_text or printed)
        self.folder = match[1]

    def _start(
        self,
        script: str,
        *,
        stdin: int | IO[bytes],
        stdout: int | IO[bytes],
        stderr: int | IO[bytes],
        master: bool = False,
    ) -> subprocess.Popen[bytes]:
        """Run a shell script by ssh, in a new session, so that Ctrl-C reaches us alone and we end it in order."""
        options = [
            "BatchMode=yes",
            f"ConnectTimeout={_SECONDS_TO_CONNECT}",
            "ServerAliveInterval=10",
            "ServerAliveCountMax=6",
            f"ControlMaster={'yes' if master else 'no'}",
            f"ControlPath={self._socket}",
            "ControlPersist=no",
            "RequestTTY=no",
            "LogLevel=ERROR",
        ]
        command = ["ssh", *(part for option in options for part in ("-o", option))]
        command += ["-l", self.place.user] if self.place.user else []
        command += ["-p", str(self.place.port)] if self.place.port else []
        command += ["--", self.place.host, f"sh -c {shlex.quote(script)}"]
        try:
            return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True)
        except FileNotFoundError as error:
            raise EdgetuneError("ssh is not installed", action="sudo apt-get install openssh-client") from error

    def run(
        self,
        script: str,
        *,
        seconds: float,
        sent: Path | bytes = b"",
        hold: bool = False,
        on_timeout: Exit = Exit.USAGE,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a shell script over there, with `sent` as its input; `hold` keeps the input open until it ends.

        Raises `EdgetuneError` on a timeout or a broken connection; other failures show in its exit code.
        """
        with contextlib.ExitStack() as ends:
            printed, errors = (ends.enter_context(tempfile.TemporaryFile()) for _ in range(2))
            given: int | IO[bytes] = subprocess.PIPE
            if not hold:
                given = ends.enter_context(sent.open("rb") if isinstance(sent, Path) else _file_of(sent))
            process = self._start(script, stdin=given, stdout=printed, stderr=errors)
            ends.callback(_kill, process)
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired as error:
                slow = self.remote_error(f"it took more than {seconds:.0f} s", "")
                slow.action = "see what else runs there; a slow or swapping machine needs a smaller program"
                slow.exit_code = on_timeout
                raise slow from error
            printed.seek(0)
            errors.seek(0)
            done = subprocess.CompletedProcess(script, code, printed.read(), errors.read())
        if code == 255:  # ssh's own
            raise self.ssh_error(code, done.stderr.decode("utf-8", "replace"))
        return done

    def push(self, content: Path | bytes, name: str) -> None:
        """Write a file in the remote folder; its parent folder is created."""
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        to = f"{self.folder}/{name}"
        script = f"mkdir -p {shlex.quote(os.path.dirname(to))} && cat >{shlex.quote(to)} && wc -c <{shlex.quote(to)}"
        done = self.run(script, seconds=60 + size / _BYTES_A_SECOND, sent=content)
        errors_text = done.stderr.decode("utf-8", "replace").strip()
        if done.returncode == 0 and done.stdout.split()[-1:] == [str(size).encode()]:
            return
        if NO_SPACE in errors_text or "Disk quota" in errors_text:
            raise self.disk_full_error(size)
        raise self.remote_error(f"{name} could not be written there", errors_text)

    def remove(self, name: str) -> None:
        """Remove a file or folder in the remote folder."""
        self.run(f"rm -rf -- {shlex.quote(f'{self.folder}/{name}')}", seconds=60)

    def disk_full_error(self, size: int) -> EdgetuneError:
        """The error for a full disk."""
        return EdgetuneError(
            f"no room is left for {size / 2**20:.1f} MiB in {os.path.dirname(self.folder) or '/var/tmp'}",
            where=str(self.place),
            action="free some there, or point TMPDIR to a larger disk in that user's environment",
        )

    def remote_error(self, message: str, output: str) -> EdgetuneError:
        """An error on the other machine, with the end of its output."""
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        detail = f": {' '.join(lines[-3:])[:500]}" if lines else ""
        return EdgetuneError(message + detail, where=str(self.place))

    def ssh_error(self, code: int, output: str) -> EdgetuneError:
        """Why ssh did not get through."""
        to = f"{self.place.user}@{self.place.host}" if self.place.user else self.place.host
        to = f"-p {self.place.port} {to}" if self.place.port else to
        if NO_SPACE in output:
            return self.disk_full_error(0)
        for phrase, message, action in _REFUSED:
            if phrase in output:
                error = self.remote_error(message, output)
                error.action = action.format(to=to)
                return error
        message = "no folder could be made there" if code == 73 else f"the connection ended (ssh's code {code})"
        error = self.remote_error(message, output)
        error.action = f"try `ssh {to} true` by hand"
        return error


def _file_of(content: bytes) -> IO[bytes]:
    file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
    file.write(content)
    file.seek(0)
    return file


def _read_until(process: subprocess.Popen[bytes], mark: str, seconds: float) -> str:
    """The output up to the line with the mark, or until the process ends or time is up."""
    assert process.stdout is not None
    printed, until = b"", time.monotonic() + seconds
    while time.monotonic() < until and not re.search(mark.encode() + rb".*\n", printed):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))
        more = os.read(process.stdout.fileno(), 4096) if ready else b""
        if ready and not more:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            break
        printed += more
    return printed.decode("utf-8", "replace")


def _close_keeper(keeper: subprocess.Popen[bytes]) -> None:
    """Close the keeper's input and wait until it has removed the folder."""
    for end in (keeper.stdin, keeper.stdout):
        if end is not None:
            with contextlib.suppress(OSError):
                end.close()
    try:
        keeper.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        keeper.kill()
        keeper.wait()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill ssh; the remote command sees its input end."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    process.kill()
    process.wait()


def shell_words(words: Sequence[str]) -> str:
    """A command for a shell, every word quoted.

    >>> shell_words(["python3", "a b"])
    "python3 'a b'"
    """
    return " ".join(shlex.quote(word) for word in words)
