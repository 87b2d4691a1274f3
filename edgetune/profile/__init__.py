"""Device descriptors, cost prediction and measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.core.ledger import Measured, Predicted
from edgetune.core.numbers import format_number
from edgetune.profile.calls import predict_calls
from edgetune.profile.device import Device, load
from edgetune.profile.layers import predicted_layers_ms
from edgetune.recipe.names import HOST
from edgetune.runtime.hosts.host import Host
from edgetune.runtime.hosts.session import measure_on

if TYPE_CHECKING:
    from edgetune.program.artifact import Artifact

__all__ = ["Profile", "profile"]


@dataclass(frozen=True)
class Profile:
    """The cost of a program, predicted for a device and, if requested, measured on this host.

    For a text-generation program it is the cost of one token, and `prompt` that of a piece of a prompt. `layers_ms`:
    predicted milliseconds of each module by its dotted name, "" for what belongs to none.
    """

    predicted: Predicted
    measured: Measured | None = None
    prompt: Profile | None = None
    layers_ms: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        call = f", {self.predicted.call}" if self.predicted.call else ""
        text = f"{self.predicted.device}{call}: predicted {format_number(self.predicted.latency_ms)} ms"
        one = self.measured
        measured = f"measured {format_number(one.latency_ms)} ms on {one.device}" if one else "not measured"
        return f"Profile({text}, {measured})"


def profile(artifact: Artifact | str | Path, device: str | Device = "pixel-8", *, measure: bool = False) -> Profile:
    """Predict the latency and memory of a program on a device. For `host`, or with `measure`, also time it on this
    host.

    `artifact`: the result of `export` or `export_language`, or the path of its `.pte`. Raises `EdgetuneError` for an
    unknown device, and for `host` before `edgetune devices calibrate` has described it.
    """
    described = device if isinstance(device, Device) else load(device)
    if isinstance(artifact, (str, Path)):
        from edgetune.program.artifact import Artifact

        artifact = Artifact.load(artifact, "model", "language")
    predicted = predict_calls(artifact, described)
    threads = described.thread_count if described.id == HOST else None
    measured: tuple[Measured | None, ...] = (
        measure_on(Host(), artifact, threads=threads) if measure or described.id == HOST else (None,) * len(predicted)
    )
    layers_ms = predicted_layers_ms(artifact, described)
    token, *prompt = (Profile(p, m, layers_ms=of) for p, m, of in zip(predicted, measured, layers_ms, strict=True))
    return replace(token, prompt=prompt[0]) if prompt else token
