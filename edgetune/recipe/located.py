"""Resolve paths: those in a recipe relative to the recipe, those on the command line to the current folder.

Both become absolute when a recipe is loaded, so that the copy in a run's folder refers to the same files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FILES = ("csv", "jsonl", "imagefolder", "fashion-mnist", "py")  # sources whose argument is a path
_SOURCES = ("model", "data", "model.source", "data.source")


def resolve_paths(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The values of a recipe, or overrides, with every path made absolute from `folder`."""
    absolute = dict(values)
    for key, value in values.items():
        if key in _SOURCES and isinstance(value, str):
            absolute[key] = resolve_source(value, folder)
        elif key in _SOURCES and isinstance(value, Mapping) and isinstance(value.get("source"), str):
            absolute[key] = {**value, "source": resolve_source(value["source"], folder)}
            if isinstance(value.get("test_file"), str):
                absolute[key]["test_file"] = _absolute(value["test_file"], folder)
        elif key == "data.test_file" and isinstance(value, str):
            absolute[key] = _absolute(value, folder)
        elif key == "export" and isinstance(value, Mapping) and isinstance(value.get("adapters"), Mapping):
            absolute[key] = {**value, "adapters": _resolve_folders(value["adapters"], folder)}
        elif key == "export.adapters" and isinstance(value, Mapping):
            absolute[key] = _resolve_folders(value, folder)
        elif key.startswith("export.adapters.") and isinstance(value, str):
            absolute[key] = _absolute(value, folder)
        elif key == "variants" and isinstance(value, Mapping):
            absolute[key] = {n: resolve_paths(v, folder) if isinstance(v, Mapping) else v for n, v in value.items()}
        elif key in ("profile", "budget", "devices", "profile.devices", "device"):
            absolute[key] = _resolve_descriptors(value, folder)
    return absolute


def resolve_source(source: str, folder: Path) -> str:
    """`csv:rows.csv` with an absolute path; `hf:` only if the folder exists, else it is a hub id."""
    kind, colon, argument = source.partition(":")
    if not argument or (kind not in _FILES and not (kind == "hf" and (folder / argument).expanduser().exists())):
        return source
    return f"{kind}{colon}{_absolute(argument, folder)}"


def relative_source(source: str, folder: Path) -> str:
    """A source relative to the current folder, rewritten relative to `folder`."""
    absolute = resolve_source(source, Path())
    kind, _, argument = absolute.partition(":")
    return source if absolute == source else f"{kind}:{os.path.relpath(argument, folder.absolute())}"


def _absolute(path: str, folder: Path) -> str:
    return os.path.normpath(folder.absolute() / Path(path).expanduser())


def _resolve_folders(folders: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return {name: _absolute(path, folder) if isinstance(path, str) else path for name, path in folders.items()}


def _resolve_descriptors(value: Any, folder: Path) -> Any:
    """The same for paths of device descriptors, which end in `.yaml`, at any depth."""
    if isinstance(value, str):
        return _absolute(value, folder) if value.endswith(".yaml") else value
    if isinstance(value, list):
        return [_resolve_descriptors(each, folder) for each in value]
    if isinstance(value, Mapping):
        return {k: _resolve_descriptors(v, folder) if k in ("devices", "device") else v for k, v in value.items()}
    return value
