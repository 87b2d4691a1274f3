"""Names that the shell completes. They are read off folders alone: each press of the tab key starts a process.

Where nothing begins with what was typed, the shell offers files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

SUFFIX = ".yaml"
PLATFORMS = ("android", "ios", "jetson", "linux")  # of kits
TARGETS = ("xnnpack", "portable", "coreml", "mps", "vulkan", "openvino", "ethos-u", "tosa", "qnn", "cuda")


def recipe_names(incomplete: str) -> list[str]:
    """Recipes in the package, and YAML files in the working folder."""
    files = sorted(path.name for path in Path().iterdir() if path.suffix == SUFFIX)
    return _beginning(incomplete, [*_packaged("edgetune.recipes"), *files])


def device_names(incomplete: str) -> list[str]:
    """Devices in the package and in the user's folder."""
    base = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    folder = (base if base.is_absolute() else Path.home() / ".config") / "edgetune" / "devices"
    own = sorted(path.stem for path in folder.glob("*" + SUFFIX))
    packaged = [name for name in _packaged("edgetune.devices") if name != "published"]
    return _beginning(incomplete, [*packaged, *own])


def platform_names(incomplete: str) -> list[str]:
    """What a kit can be made for."""
    return _beginning(incomplete, PLATFORMS)


def target_names(incomplete: str) -> list[str]:
    """What a program can be lowered to."""
    return _beginning(incomplete, TARGETS)


def _packaged(package: str) -> list[str]:
    names = [item.name for item in resources.files(package).iterdir()]
    return sorted(name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX))


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
