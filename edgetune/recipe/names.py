"""Names that a recipe may use, without heavy imports: targets, and devices that have a descriptor."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

TARGET_NAMES = ("xnnpack", "portable", "coreml", "vulkan", "openvino", "ethos-u", "tosa", "qnn", "cuda")

_GONE_TARGETS = {"mps": "ExecuTorch has had no MPS backend since 1.5; use coreml, which runs on the same GPU"}

SUFFIX = ".yaml"
HOST = "host"
PUBLISHED = "published"  # beside the descriptors: measurements, no device


def unknown_target(name: str) -> dict[str, Any]:
    """The details of an error about a target that does not exist."""
    gone = _GONE_TARGETS.get(name)
    return {"got": name, **({"action": gone} if gone else {"allowed": TARGET_NAMES})}


def user_folder() -> Path:
    """The folder of your own descriptors: `$XDG_CONFIG_HOME/edgetune/devices`, by default under `~/.config`."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    # the XDG specification says to ignore a relative path
    folder = Path(base) if base and Path(base).is_absolute() else Path.home() / ".config"
    return folder / "edgetune" / "devices"


def packaged_ids() -> tuple[str, ...]:
    """Names of the descriptors in the package."""
    names = (item.name for item in resources.files("edgetune.devices").iterdir())
    return tuple(sorted(n.removesuffix(SUFFIX) for n in names if n.endswith(SUFFIX) and n != PUBLISHED + SUFFIX))


def user_descriptors() -> dict[str, Path]:
    """Descriptors in the user's folder, by name."""
    folder = user_folder()
    return {path.stem: path for path in sorted(folder.glob("*" + SUFFIX))} if folder.is_dir() else {}


def device_ids() -> tuple[str, ...]:
    """All device names: those in the package, then those in the user's folder."""
    names = packaged_ids()
    return names + tuple(name for name in user_descriptors() if name not in names)
