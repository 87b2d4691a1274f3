"""Child processes without the seconds of their imports: a server imports once and forks for each request.

`python -m edgetune.runtime.forks` is the server. It reads requests from stdin, one line of JSON each, and forks; the
fork answers the request in its folder as `python -m MODULE FOLDER` would, and ends. The server writes its exit code
to stdout. A program that crashes takes only the fork down. Programs whose time or memory is measured get a fresh
process instead (`edgetune.runtime.run`).
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

from edgetune.runtime.clock.runs import ENVIRONMENT

_MODULE = "edgetune.runtime.forks"
_MODULES = ("edgetune.runtime.run", "edgetune.runtime.training", "edgetune.runtime.language")

AVAILABLE = sys.platform == "linux"  # elsewhere a process with system libraries loaded cannot safely be forked


class ForkServer:
    """The server and its pipes. It ends with this process."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**ENVIRONMENT, **os.environ},
            cwd="/",  # nothing in the caller's folder can shadow a package
            start_new_session=True,  # so that it and its fork can be ended together
            encoding="utf-8",
        )

    def run(self, module: str, folder: Path) -> int | None:
        """Exit code of a fork that answers the request in `folder`, negative for a signal; None without a server."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"module": module, "folder": str(folder), "environment": dict(os.environ)}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        except BaseException:  # interrupted: the fork ends too
            self.kill()
            raise
        return int(reply) if reply else None

    def kill(self) -> None:
        """End the server and its fork."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """Close its pipes, which ends the server."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()


_server: ForkServer | None = None
_in_use = threading.Lock()


def prepare() -> None:
    """Start the server, which imports while this process continues."""
    global _server
    if not AVAILABLE or not _in_use.acquire(blocking=False):
        return
    try:
        if _server is None or _server.owner != os.getpid():  # a fork of this process cannot use its server
            _server = ForkServer()
            atexit.register(_close, _server)
    finally:
        _in_use.release()


def _close(server: ForkServer) -> None:
    if server.owner == os.getpid():
        server.close()


def run(module: str, folder: Path) -> int | None:
    """The exit code of `python -m module folder`, by a fork. None if no fork is available now."""
    global _server
    prepare()
    if not AVAILABLE or not _in_use.acquire(blocking=False):  # another thread's request is under way
        return None
    try:
        if _server is None:
            return None
        code = _server.run(module, folder)
        if code is None:
            _server.kill()
            _server = None
        return code
    except BaseException:
        _server = None
        raise
    finally:
        _in_use.release()


# The server's side.


def _serve() -> int:
    requests, replies = os.dup(0), os.dup(1)  # no fork may read requests or write replies
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    for module in _MODULES:
        importlib.import_module(module)
    importlib.import_module("safetensors.torch")
    importlib.import_module("edgetune.runtime.clock.runs").load_runtime(None)
    with os.fdopen(requests, encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                os.close(replies)
                _answer(request["module"], Path(request["folder"]), request["environment"])
            _, status = os.waitpid(pid, 0)
            os.write(replies, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    return 0


def _answer(module: str, folder: Path, environment: dict[str, str]) -> None:
    """The fork: answers and ends, whatever happens."""
    code = 1
    try:
        os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        code = importlib.import_module(module).main(folder)
    except BaseException:  # nothing may return into the server's loop
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(_serve())
