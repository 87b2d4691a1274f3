"""Functions in the user's own files: `py:path/to/file.py:function`. Calling one runs that file."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.other_names import nearest_file, nearest_function

PREFIX = "py:"
_FORM = "py:path/to/file.py:function"


def split_source(source: str) -> tuple[Path, str]:
    """The file and the function that `py:file.py:function` names. Raises `EdgetuneError` for any other form."""
    file, colon, function = source.removeprefix(PREFIX).rpartition(":")
    if not colon or not file.endswith(".py") or not function.isidentifier():
        near = nearest_function(source)
        raise EdgetuneError("this does not name a function in a file", got=source, near=near, action=f"write {_FORM}")
    return Path(file).expanduser(), function


def contents_digest(source: str) -> str:
    """SHA-256 of the file that `py:file.py:function` names; "" for any other source, or if there is no such file."""
    if not source.startswith(PREFIX):
        return ""
    path, _ = split_source(source)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def load_function(source: str) -> Callable[..., Any]:
    """Run the file, and return its function. The file may import modules next to it.

    Raises `EdgetuneError` if there is no such file or function, or if the file itself fails.
    """
    path, name = split_source(source)
    if not path.is_file():
        near = nearest_file(path)
        action = f"write {_FORM}, with a path relative to the current folder"
        raise EdgetuneError(
            "no such file", got=str(path), near=str(path.with_name(near)) if near else "", action=action
        )
    path = path.resolve()
    module_name = f"edgetune_own_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # pickling what it defines, and dataclasses, look it up there
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise _error_in_file(path, f"{path.name} cannot be run", error) from error
    functions = {n: v for n, v in vars(sys.modules[module_name]).items() if callable(v) and not n.startswith("_")}
    if name not in functions:
        raise EdgetuneError(f"{path.name} defines no such function", got=name, allowed=sorted(functions))
    function: Callable[..., Any] = functions[name]
    return function


def call_own(source: str, *optional: Any) -> Any:
    """Call the function with as many of the `optional` arguments as it takes by position, and return its result."""
    function = load_function(source)
    path, name = split_source(source)
    try:
        return function(*optional[: _count_positional(function)])
    except EdgetuneError:
        raise
    except Exception as error:
        raise _error_in_file(path, f"{name} in {path.name} failed", error) from error


def _count_positional(function: Callable[..., Any]) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return sum(parameter.kind in kinds and parameter.default is parameter.empty for parameter in parameters)


def _error_in_file(path: Path, problem: str, error: Exception) -> EdgetuneError:
    frames: Sequence[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    line = own[-1].lineno if own else getattr(error, "lineno", None)
    where = f"{path}, line {line}" if line else str(path)
    return EdgetuneError(
        f"{problem}: {type(error).__name__}: {error}", where=where, action="fix it there", exit_code=Exit.USAGE
    )
