"""Names say what they hold, and no two classes share one (the glossary is in CONTRIBUTING)."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.relative_to(ROOT) for room in ("edgetune", "export") for path in (ROOT / room).rglob("*.py"))
SAY_NOTHING = {"found", "told", "said", "known", "heard", "what"}
EXCEPTIONS = {  # part of the public surface
    ("edgetune/core/errors.py", "what"),  # EdgetuneError(what, ...)
    ("edgetune/core/validated.py", "what"),  # Problem, which becomes an EdgetuneError
    ("edgetune/prune/structured.py", "what"),  # a setting of Prune
}


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name that a module binds, with its line: of a function, class, parameter, variable, attribute or alias."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node) != "error.what":  # of an EdgetuneError
                yield node.lineno, node.attr
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            yield node.lineno, node.name
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


def is_empty(name: str) -> bool:
    """Whether a name has a word that fits any result.

    >>> is_empty("_found"), is_empty("told_of"), is_empty("foundation")
    (True, True, False)
    """
    return bool(SAY_NOTHING & set(name.split("_")))


def test_names_say_what_they_hold() -> None:
    assert [
        f"{path}:{line}: {name}"
        for path in FILES
        for line, name in bound_names(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        if is_empty(name) and (path.as_posix(), name) not in EXCEPTIONS
    ] == []


def test_no_two_classes_share_a_name() -> None:
    places = defaultdict(list)
    for path in FILES:
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path}:{node.lineno}")
    assert {name: lines for name, lines in places.items() if len(lines) > 1} == {}
