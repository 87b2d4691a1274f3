"""Programs run in forks of a server: the same answers, and what a fork does to itself happens to it alone."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from edgetune.runtime import forks
from edgetune.runtime.clock.runs import ENVIRONMENT
from edgetune.runtime.forks import ForkServer
from edgetune.runtime.run import run_in_child

pytestmark = pytest.mark.skipif(not forks.AVAILABLE, reason="processes are forked on Linux alone")

ANSWERS = """
import os, signal, sys
from pathlib import Path

def main(folder):
    order = (folder / "order").read_text()
    if order == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if order == "raise":
        raise RuntimeError("a reason")
    print("nobody reads this")
    (folder / "answer").write_text(f"{Path.cwd()} {os.environ.get('FORKED')} {sys.stdin.read()}")
    return 7
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ForkServer:
    (tmp_path / "answers.py").write_text(ANSWERS, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return ForkServer()


def test_a_fork_answers_as_a_process_of_its_own_would(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its folder, in the environment of the moment, its errors in a file; its end is its own."""
    folder = tmp_path / "request"
    folder.mkdir()

    def ask(order: str) -> int | None:
        (folder / "order").write_text(order, encoding="utf-8")
        return server.run("answers", folder)

    try:
        monkeypatch.setenv("FORKED", "yes")
        assert ask("answer") == 7
        assert (folder / "answer").read_text(encoding="utf-8") == f"{folder} yes "
        assert ask("die") == -9
        assert ask("raise") == 1
        assert (folder / "stderr").read_text(encoding="utf-8").endswith("RuntimeError: a reason\n")
        monkeypatch.delenv("FORKED")
        assert ask("answer") == 7
        assert (folder / "answer").read_text(encoding="utf-8") == f"{folder} None "
        server._process.kill()
        server._process.wait()
        assert ask("answer") is None
    finally:
        server.kill()


def test_a_program_runs_where_the_server_has_died_or_is_in_use(program: Path) -> None:
    inputs = [(torch.full((1, 8), 0.5),)]
    ((expected,),) = run_in_child(program, inputs)
    assert forks._server is not None
    os.kill(forks._server._process.pid, 9)
    forks._server._process.wait()
    ((after,),) = run_in_child(program, inputs)  # by a process of its own
    assert torch.equal(after, expected)
    outputs: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: outputs.append(run_in_child(program, inputs)[0][0])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 2
    assert all(torch.equal(output, expected) for output in outputs)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgetune.export import export

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("forks") / "model.pte"
    export(torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU()), (torch.randn(1, 8),), path)
    return path


def test_the_environment_keeps_a_library_from_starting_threads_in_the_runtimes_threads(server: ForkServer) -> None:
    """It is read when the server imports torch, before any request."""
    environment = Path(f"/proc/{server._process.pid}/environ").read_bytes().split(b"\0")
    assert set(ENVIRONMENT) <= {entry.partition(b"=")[0].decode() for entry in environment}
    server.close()
