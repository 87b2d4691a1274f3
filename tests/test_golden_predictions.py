"""Law: predictions for stored programs and for published rows stay as they are, until somebody means to change them.

`pytest tests/test_golden_predictions.py --update` writes the values anew.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from edgetune.profile import device, published
from edgetune.profile.calls import predict_calls
from edgetune.program.artifact import Artifact
from edgetune.program.manifest import Manifest

GOLDEN = Path(__file__).with_name("golden")
FIGURES = ("latency_ms", "latency_low_ms", "latency_high_ms", "peak_memory_mib", "energy_mj", "cold_start_ms")


def of_programs() -> dict[str, list[float | None]]:
    """The figures of each kind of call of the stored manifests (a 4-bit MiniLM, a 4-bit SmolLM2), on each device."""
    artifacts = {
        name: Artifact(
            Path(f"{name}.pte"),
            Manifest.model_validate_json(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes())),
        )
        for name in ("text", "language")
    }
    return {
        " ".join(filter(None, (name, identity, prediction.call))): [getattr(prediction, figure) for figure in FIGURES]
        for name, artifact in artifacts.items()
        for identity in device.packaged_ids()
        for prediction in predict_calls(artifact, identity)
    }


def of_published_rows() -> dict[str, list[float | None]]:
    """What the predictor by itself says of each published row of a device with a descriptor."""
    rows = enumerate(published.figures_of(published.load_published()))
    described = {identity: device.load(identity) for identity in device.packaged_ids()}
    return {
        f"{number} {row.column.device} {row.label}": [published.predict_figure(row, described[row.column.device])]
        for number, row in rows
        if row.column.device in described
    }


@pytest.mark.parametrize("predictions", [of_programs, of_published_rows])
def test_predictions_stay(predictions: object, request: pytest.FixtureRequest) -> None:
    assert callable(predictions)
    values = predictions()
    path = GOLDEN / f"{predictions.__name__.removeprefix('of_')}.json"
    if request.config.getoption("--update"):
        lines = (f"{json.dumps(name)}: {json.dumps(figures)}" for name, figures in values.items())
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert values.keys() == stored.keys()
    for name, figures in values.items():
        # the last digits of a logarithm differ between processors
        assert figures == pytest.approx(stored[name], rel=1e-9), name
