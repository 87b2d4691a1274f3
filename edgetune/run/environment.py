"""Describe this machine and this installation, for `edgetune env` and for the record of every run."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from edgetune.core.registry import installed_version
from edgetune.recipe.names import HOST, device_ids
from edgetune.runtime import host
from edgetune.runtime.clock.machine import cpuinfo, text_of, usable_cores

STACK = (
    "edgetune", "torch", "executorch", "torchao", "transformers", "peft", "bitsandbytes", "plotly",
)  # fmt: skip
FLAGS = {  # as the kernel prints them; those that change how fast a matrix product is
    "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2",
}  # fmt: skip


class Environment(BaseModel):
    """Versions, machine, installed extras and available targets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    python: str
    platform: str
    versions: dict[str, str | None]  # None: not installed
    cpu: str
    cpu_flags: tuple[str, ...]
    cores: int  # that this process may use
    memory_mib: int | None  # that this process may use; None: the system does not say
    accelerators: tuple[str, ...]
    extras: dict[str, tuple[str, ...]]  # extra -> requirements that are missing; () means installed
    targets: dict[str, str]  # target -> whether it can be lowered and run here, or what to install
    host_calibrated: bool


def detect_environment() -> Environment:
    """Inspect this machine; runs only a child process that imports executorch's partitioners."""
    return Environment(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        versions={name: installed_version(name) for name in STACK},
        cpu=host.cpu_name(),
        cpu_flags=_flags(),
        cores=usable_cores(),
        memory_mib=_memory_mib(),
        accelerators=_accelerators(),
        extras=_extras(),
        targets=_targets(),
        host_calibrated=HOST in device_ids(),
    )


def installed_versions() -> dict[str, str]:
    """For a run's record: installed versions of the stack, Python, system and processor."""
    installed = {name: version for name in STACK if (version := installed_version(name))}
    return {**installed, "python": platform.python_version(), "platform": platform.platform(), "cpu": host.cpu_name()}


def _flags() -> tuple[str, ...]:
    fields = cpuinfo()
    return tuple(sorted(FLAGS & set((fields.get("flags") or fields.get("Features") or "").split())))


def _memory_mib() -> int | None:
    try:
        fitted = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
    limit = text_of(Path("/sys/fs/cgroup/memory.max"))
    return min(fitted, int(limit) if limit.isdecimal() else fitted) // 2**20


def _accelerators() -> tuple[str, ...]:
    import torch

    if torch.cuda.is_available():
        return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return ("Apple GPU (MPS)",) if torch.backends.mps.is_available() else ()


def _extras() -> dict[str, tuple[str, ...]]:
    """The missing requirements of each extra, from the package's metadata."""
    try:
        required = metadata.requires("edgetune") or []
    except metadata.PackageNotFoundError:
        return {}
    missing_by_extra: dict[str, list[str]] = {}
    for requirement in required:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if extra and name and name[0] != "edgetune":
            missing = missing_by_extra.setdefault(extra[1], [])
            if installed_version(name[0]) is None:
                missing.append(name[0])
    return {extra: tuple(missing) for extra, missing in missing_by_extra.items()}


def _targets() -> dict[str, str]:
    """The state of every target, from a child process: importing all partitioners is slow, prints, and could crash."""
    script = (
        "import json; from edgetune.export.targets import TARGETS, lowerable_targets; found = lowerable_targets();"
        "print(); print(json.dumps({n: found.get(n, 'not here: ' + t.install) for n, t in TARGETS.items()}))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {}
    targets: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return targets


def format_environment(env: Environment) -> str:
    """The environment as lines for a terminal."""
    lines = [
        f"edgetune {env.versions['edgetune']}, Python {env.python}, {env.platform} ({sys.executable})",
        f"cpu: {env.cpu}, {env.cores} cores usable; {' '.join(env.cpu_flags) or 'flags unknown'}",
        f"memory: {env.memory_mib} MiB usable" if env.memory_mib else "memory: unknown",
        f"accelerators: {', '.join(env.accelerators) or 'none'}",
        "versions:",
        *(f"  {name} {version or 'not installed'}" for name, version in env.versions.items() if name != "edgetune"),
        "extras:",
        *(f"  {extra}: {'missing ' + ', '.join(rest) if rest else 'installed'}" for extra, rest in env.extras.items()),
        "targets:",
        *(f"  {target}: {reason}" for target, reason in env.targets.items()),
        *([] if env.targets else ['  none: pip install "edgetune[export]"']),
        "this host: calibrated" if env.host_calibrated else "this host: not calibrated (`edgetune devices calibrate`)",
    ]
    return "\n".join(lines)
