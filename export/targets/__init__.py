"""The backends that a program can be lowered to. One target, one file."""

from __future__ import annotations

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.export.targets.coreml import COREML
from edgetune.export.targets.cuda import CUDA
from edgetune.export.targets.ethos_u import ETHOS_U
from edgetune.export.targets.openvino import OPENVINO
from edgetune.export.targets.portable import PORTABLE
from edgetune.export.targets.qnn import QNN
from edgetune.export.targets.target import Target
from edgetune.export.targets.tosa import TOSA
from edgetune.export.targets.vulkan import VULKAN
from edgetune.export.targets.xnnpack import XNNPACK
from edgetune.recipe.names import unknown_target

TARGETS = {target.name: target for target in (XNNPACK, PORTABLE, COREML, VULKAN, OPENVINO, ETHOS_U, TOSA, QNN, CUDA)}


def find(name: str) -> Target:
    """The target of that name."""
    if name not in TARGETS:
        raise EdgetuneError("unknown target", **unknown_target(name))
    return TARGETS[name]


def for_device(device: str | None, target: str | None) -> Target:
    """The requested target, or the device's first one, for its chip; XNNPACK if neither is given."""
    if device is None:
        return find(target or "xnnpack")
    from edgetune.profile.device import load

    descriptor = load(device)
    if target is not None and target not in (*descriptor.targets, "portable"):
        raise EdgetuneError(
            f"{device} does not run this target",
            got=target,
            allowed=[*descriptor.targets, "portable"],
            exit_code=Exit.EXPORT,
        )
    return find(target or descriptor.targets[0]).for_soc(descriptor.soc)


def lowerable_targets() -> dict[str, str]:
    """Every target this machine can lower to, and whether it can also run the programs."""
    lowerable = {}
    for name, target in TARGETS.items():
        if not target.lacks():
            lowerable[name] = (
                "lowers and runs here" if target.runs_here else "lowers here; cannot be run on this machine"
            )
    return lowerable
