"""The house: rooms stand on floors, and import from their own floor or below; no circle among the files; none too long.

Every import counts, also those inside of functions and those for types alone.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import networkx  # torch brings it
import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    ("core",),
    ("recipe", "data", "models", "tasks", "lean", "train", "program", "runtime", "capture"),
    ("adapt", "sparse", "prune", "quant", "integrations"),
    ("export", "profile"),
    ("report",),
    ("run",),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MAY_EXPORT = {"export", "run", "cli"}  # the rooms that import what makes a program


@cache
def files() -> Mapping[str, Path]:
    """The modules by name, `edgetune.` left out: `run.fold`, `export.lower`."""
    found = {}
    for folder, prefix in ((ROOT / "edgetune", ()), (ROOT / "export", ("export",))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str) -> Iterator[str]:
    """The modules that a module imports, `edgetune.` left out."""
    for node in ast.walk(ast.parse(files()[name].read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:  # the few relative ones stay in their folder
            names = [f"{node.module}.{other}" for other in names]
        for full in names:
            own = full.removeprefix("edgetune.") if full.startswith("edgetune.") else ""
            while own and own not in files():
                own = own.rpartition(".")[0]
            if own and own != name:
                yield own


@cache
def graph() -> Mapping[str, frozenset[str]]:
    return {name: frozenset(imports(name)) for name in files()}


def text_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def room(name: str) -> str:
    return name.partition(".")[0]


def test_only_rooms_stand_at_the_root_of_the_package() -> None:
    assert {path.stem for path in (ROOT / "edgetune").glob("*.py")} == {"__init__", "__main__"}
    assert {room(name) for name in files()} - {"", "__main__"} == set(FLOOR)


@pytest.mark.parametrize("name", list(FLOOR))
def test_a_room_imports_from_its_floor_or_below(name: str) -> None:
    upward = {
        (module, room(other))
        for module, others in graph().items()
        if room(module) == name
        for other in others
        if FLOOR[room(other)] > FLOOR[name] or (room(other) == "export" and name not in MAY_EXPORT)
    }
    assert upward == set()


def circles() -> list[set[str]]:
    """The sets of files that reach each other by their imports."""
    together = networkx.strongly_connected_components(networkx.DiGraph(graph()))
    return [component for component in together if len(component) > 1]


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles() == []


def test_no_test_imports_another() -> None:
    """What tests share lies in tests/support; there, too, code that runs in a process of its own is text."""
    folder = ROOT / "tests"
    modules = {path.stem for path in folder.glob("test_*.py")}
    found = {
        (path.name, word)
        for path in folder.rglob("*.py")
        for word in re.findall(r"^\s*(?:from|import) (test_\w+)", path.read_text(encoding="utf-8"), re.M)
    }
    assert {pair for pair in found if pair[1] in modules} == set()


def test_no_file_has_more_than_400_lines() -> None:
    folders = ("edgetune", "export", "tests", "benchmarks")
    lengths = {path: text_lines(path) for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > 400} == {}
