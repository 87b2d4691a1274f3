"""Shell completion of names. They are read from folders alone: each press of the tab key starts a process.

If no name begins with the typed text, the shell offers files.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from edgetune.core.floats import FLOAT_TYPES, KEY_VALUE_TYPES
from edgetune.recipe.names import SUFFIX, TARGET_NAMES, device_ids

PLATFORMS = ("android", "ios", "jetson", "linux")  # of kits


def recipe_names(incomplete: str) -> list[str]:
    """Recipes in the package, and YAML files in the working folder."""
    files = sorted(path.name for path in Path().iterdir() if path.suffix == SUFFIX)
    packaged = [item.name for item in resources.files("edgetune.recipes").iterdir()]
    names = sorted(name.removesuffix(SUFFIX) for name in packaged if name.endswith(SUFFIX))
    return _beginning(incomplete, [*names, *files])


def device_names(incomplete: str) -> list[str]:
    """Devices in the package and in the user's folder."""
    return _beginning(incomplete, device_ids())


def platform_names(incomplete: str) -> list[str]:
    """The platforms of kits."""
    return _beginning(incomplete, PLATFORMS)


def target_names(incomplete: str) -> list[str]:
    """The targets of programs."""
    return _beginning(incomplete, TARGET_NAMES)


def float_types(incomplete: str) -> list[str]:
    """The types that a program computes in."""
    return _beginning(incomplete, FLOAT_TYPES)


def key_value_types(incomplete: str) -> list[str]:
    """The types of a cache."""
    return _beginning(incomplete, KEY_VALUE_TYPES)


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
