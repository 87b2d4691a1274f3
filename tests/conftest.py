"""One thread each: tests are small, and threads that wait for each other cost more than they bring."""

from __future__ import annotations

import gc
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

gc.set_threshold(100_000, 10, 10)  # the libraries' million objects stay: to look through them took a tenth of the time
import torch  # noqa: E402

if TYPE_CHECKING:
    from edgetune.program.artifact import Artifact
    from support.programs import Small

pytest.register_assert_rewrite("support")
torch.set_num_threads(1)

# a file stays with one worker: those that take longest begin first, or one worker ends alone with them
LONG = (
    "recipes", "golden", "language", "training_program", "laws", "calibrate", "first_hour", "kernels", "ssh", "export",
    "random_modules", "kit_samples", "executed",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update", action="store_true", help="write the values of golden files anew")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(LONG)))
    mark_slow(items)


def mark_slow(items: list[pytest.Item]) -> None:
    """Mark the tests that slow.txt names. Raises for a pattern that names none of the whole suite."""
    here = Path(__file__).parent
    lines = (here / "slow.txt").read_text(encoding="utf-8").splitlines()
    for pattern in (line for line in lines if line and not line.startswith("#")):
        named = [item for item in items if fnmatchcase(f"{item.path.name}::{item.name}", pattern)]
        for item in named:
            item.add_marker(pytest.mark.slow)
        if not named and whole_suite(items, here):
            raise pytest.UsageError(f"slow.txt: no such test: {pattern}")


def whole_suite(items: list[pytest.Item], here: Path) -> bool:
    """Whether every file of tests was collected."""
    return {path.name for path in here.glob("test_*.py")} <= {item.path.name for item in items}


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe, alone in the working directory."""
    from support.command_line import RECIPE

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


# Programs that several files only read: made when the first test of a process asks for one


@pytest.fixture(scope="session")
def text_program(tmp_path_factory: pytest.TempPathFactory) -> Small:
    from support import programs

    return programs.text_program(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def picture_program(tmp_path_factory: pytest.TempPathFactory) -> Small:
    from support import programs

    return programs.picture_program(tmp_path_factory.mktemp("picture"))


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    from support.decoders import export_decoder, llama

    return export_decoder(llama(), tmp_path_factory.mktemp("talking"))


# the scripts of the README train on import (test_integrations runs them); a stand-in is run by its tests
collect_ignore_glob = ["support/examples_*.py", "support/standin_*.py"]
