"""Time a run's program here and predict it for devices, beside the model before it was quantized."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.core.ledger import Layers, Measured, Predicted
from edgetune.core.progress import Progress
from edgetune.recipe.names import HOST, device_ids
from edgetune.recipe.sections import ProfileSettings
from edgetune.run.exportable import Exportable, to_program

if TYPE_CHECKING:
    from edgetune.export.targets.target import Target
    from edgetune.program.artifact import Artifact


def profile_program(
    artifact: Artifact, asked: ProfileSettings, before: Exportable | None, target: Target, progress: Progress
) -> dict[str, Any]:
    """The ledger's figures of every kind of call: timed on this host, and predicted for each device.

    `before`: the model before it was quantized, which is lowered to a program that is not kept, and predicted.
    """
    from edgetune.profile.calls import predict_calls
    from edgetune.profile.layers import predict_layers
    from edgetune.runtime.hosts.host import Host
    from edgetune.runtime.hosts.session import measure_on

    devices = [*asked.devices]
    measured: tuple[Measured, ...] = ()
    if asked.measure and target.runs_here:
        progress("profile", 0, len(devices) + 1, "this host")
        measured = measure_on(Host(), artifact, by_layer=True)
        devices += [HOST] if HOST in device_ids() and HOST not in devices else []  # predicted beside measured
    predicted: list[Predicted] = []
    by_layer: list[Layers] = []
    for number, device in enumerate(devices):
        progress("profile", number + 1, len(devices) + 1, device)
        predicted += predict_calls(artifact, device)
        by_layer += predict_layers(artifact, device)
    unquantized: list[Predicted] = []
    if before is not None and devices:
        progress("profile", len(devices), len(devices) + 1, "the model before it was quantized")
        with tempfile.TemporaryDirectory() as folder:
            plain = to_program(before, Path(folder) / "model.pte", target=target.name)
            unquantized = [line for device in devices for line in predict_calls(plain, device)]
    progress("profile", 1, 1, "")
    lines = {"predicted": tuple(predicted), "unquantized": tuple(unquantized), "layers": tuple(by_layer)}
    return {"measured": measured, **lines}
