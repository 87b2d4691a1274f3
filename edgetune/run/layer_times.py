"""Predicted times of the layers of a model's program on a device, for techniques that choose by them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from edgetune.data.dataset import Split
from edgetune.profile.device import load
from edgetune.profile.layers import predicted_layers_ms
from edgetune.program.carried import Carried
from edgetune.recipe.sections import ExportSettings
from edgetune.run.exportable import exportable_from_split, to_program


def layers_ms_of(
    split: Split, max_length: int, settings: ExportSettings | None, carried: Carried
) -> Callable[[nn.Module, str], Mapping[str, float]]:
    """A function that exports a model and predicts the time of each module of its program on a device, in ms.

    Of several kinds of call, the first: one token of a text-generation program. What belongs to no module is under "".
    """
    asked = settings or ExportSettings()

    def predict(model: nn.Module, device: str) -> Mapping[str, float]:
        described = load(device)
        source = exportable_from_split(model, split, max_length, asked, carried)
        source = replace(source, check_inputs=None, min_same_prediction_pct=0.0)
        with tempfile.TemporaryDirectory() as folder:
            artifact = to_program(source, Path(folder) / "model.pte", target=asked.target)
            return predicted_layers_ms(artifact, described)[0]

    return predict
