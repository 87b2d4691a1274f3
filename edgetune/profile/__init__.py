"""Device descriptors, cost prediction and measurement."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.ledger import Measured, Predicted
from edgetune.profile.cost import predict
from edgetune.profile.device import HOST, Device, load
from edgetune.profile.measure import measure as measure_on_host

if TYPE_CHECKING:
    from edgetune.export.artifact import Artifact

__all__ = ["Profile", "profile"]


@dataclass(frozen=True)
class Profile:
    """What a program costs: computed for a device, and, where it was asked for, measured on this host."""

    predicted: Predicted
    measured: Measured | None = None


def profile(artifact: Artifact | str | Path, device: str | Device = "pixel-8", *, measure: bool = False) -> Profile:
    """Predict the cost of a program on a device; for `host`, or with `measure`, also run it here.

    `artifact`: what `export` returned, or the path of its `.pte`. Raises `EdgetuneError` for an unknown device, and
    for `host` before `edgetune devices calibrate` has described it.
    """
    described = device if isinstance(device, Device) else load(device)
    if isinstance(artifact, (str, Path)):
        from edgetune.export.artifact import Artifact

        artifact = Artifact.load(Path(artifact))
    manifest = artifact.manifest
    predicted = predict(
        manifest.operators,
        described,
        plan_bytes=manifest.plan_bytes,
        program_bytes=manifest.size_bytes,
        delegate_calls=manifest.delegates,
    )
    here = measure or described.id == HOST
    threads = described.thread_count if described.id == HOST else None
    return Profile(predicted, measure_on_host(artifact, threads=threads) if here else None)
