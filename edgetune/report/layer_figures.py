"""The rooflines of a run's page: the program that lies beside it, on the devices that it was predicted for."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from edgetune.core.errors import EdgetuneError
from edgetune.core.ledger import Ledger
from edgetune.report.drawing import Figure


def rooflines_of(ledger: Ledger, folder: Path) -> tuple[Figure, ...]:
    """A picture for each predicted call; none where the folder holds another program, or none, or no manifest.

    Layers are not in the ledger: they are computed from the program's manifest and today's descriptors.
    """
    if ledger.program is None or not ledger.predicted:
        return ()
    path = folder / Path(ledger.program.path).name
    if not path.with_suffix(".json").is_file():
        return ()
    from edgetune.profile.layers import Layers, layers
    from edgetune.program.artifact import Artifact
    from edgetune.report.pictures import rooflines

    try:
        artifact = Artifact.load(path, "model", "language")
    except EdgetuneError:  # a file that was changed since: its layers are not this run's
        return ()
    if artifact.manifest.sha256 != ledger.program.sha256:
        return ()
    found: list[Layers] = []
    for name in dict.fromkeys(line.device for line in ledger.predicted):
        with suppress(EdgetuneError):  # a device that is gone since; the rest of the page stands
            found += layers(artifact, name)
    return rooflines(found)
