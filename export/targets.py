"""The backends that a program can be lowered to, and what each needs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from edgetune.quiet import quiet
from edgetune.technique import EdgetuneError, Exit


@dataclass(frozen=True)
class Target:
    """How to reach one backend. `partitioner` is `module:Class`, empty for plain kernels."""

    name: str
    partitioner: str
    needs: tuple[str, ...]  # modules that must import before the partitioner does
    install: str  # what to do where they do not
    runs_here: bool  # whether the wheel on a Linux host can run the program

    def partitioners(self) -> list[Any]:
        """The partitioner of this backend, ready to use, or the error that says what to install."""
        if not self.partitioner:
            return []
        module, _, name = self.partitioner.partition(":")
        try:
            with quiet():
                for needed in self.needs:
                    importlib.import_module(needed)
                kind = getattr(importlib.import_module(module), name)
        except ImportError as error:
            raise EdgetuneError(
                f"target {self.name} cannot be lowered on this machine ({error})",
                action=self.install,
                exit_code=Exit.EXPORT,
            ) from error
        with quiet():
            return [kind(_mps_specs())] if self.name == "mps" else [kind()]


def _mps_specs() -> list[Any]:
    from executorch.exir.backend.backend_details import CompileSpec

    return [CompileSpec("use_fp16", bytes([False]))]


_EXTRA = 'pip install "edgetune[export]"'

TARGETS = {
    target.name: target
    for target in (
        Target(
            "xnnpack", "executorch.backends.xnnpack.partition.xnnpack_partitioner:XnnpackPartitioner", (), _EXTRA, True
        ),
        Target("portable", "", (), _EXTRA, True),
        Target(
            "coreml",
            "executorch.backends.apple.coreml.partition:CoreMLPartitioner",
            ("coremltools",),
            "pip install coremltools (and lower on macOS or Linux)",
            False,
        ),
        Target(
            "mps",
            "executorch.backends.apple.mps.partition.mps_partitioner:MPSPartitioner",
            (),
            _EXTRA,
            False,
        ),
        Target(
            "vulkan",
            "executorch.backends.vulkan.partitioner.vulkan_partitioner:VulkanPartitioner",
            (),
            _EXTRA,
            False,
        ),
    )
}


def find(name: str) -> Target:
    """The target of that name."""
    if name not in TARGETS:
        raise EdgetuneError("unknown target", got=name, allowed=TARGETS, exit_code=Exit.EXPORT)
    return TARGETS[name]


def for_device(device: str | None, target: str | None) -> Target:
    """The target that was asked for, or the first of the device's that this table has; without both, XNNPACK."""
    if device is None:
        return find(target or "xnnpack")
    from edgetune.profile.device import load

    offered = load(device).targets
    if target is None:
        known = [name for name in offered if name in TARGETS]
        return find(known[0] if known else str(offered[0]))
    if target != "portable" and target not in offered:
        raise EdgetuneError(
            f"{device} does not run this target",
            got=target,
            allowed=[*offered, "portable"],
            exit_code=Exit.EXPORT,
        )
    return find(target)


def available() -> dict[str, str]:
    """Every target this machine can lower to, with whether it can also run what comes out."""
    found = {}
    for name, target in TARGETS.items():
        try:
            target.partitioners()
        except EdgetuneError:
            continue
        found[name] = "lowers and runs here" if target.runs_here else "lowers here; cannot be run on this machine"
    return found
