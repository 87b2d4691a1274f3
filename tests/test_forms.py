"""`--fastest-form`, and the comparison of a run's quantized program with the model before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from edgetune.core.apply import apply
from edgetune.core.errors import EdgetuneError
from edgetune.core.technique import Sample
from edgetune.profile.calls import predict_calls
from edgetune.program.artifact import Artifact
from edgetune.program.carried import Carried
from edgetune.quant.int8 import Int8, Static8
from edgetune.quant.int8_dynamic import Int8Dynamic
from edgetune.run.exportable import Exportable
from edgetune.run.exporting import export_from
from edgetune.run.forms import choose_fastest

WIDE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))

def inputs():
    return [torch.randn(1, 256) for _ in range(3)]
"""


def test_export_takes_the_form_with_the_lowest_prediction(tmp_path: Path) -> None:
    (tmp_path / "wide.py").write_text(WIDE, encoding="utf-8")
    asked = {"inputs": f"py:{tmp_path}/wide.py:inputs", "device": "pixel-8"}
    source = f"py:{tmp_path}/wide.py:build"
    plain = export_from(source, tmp_path / "plain.pte", **asked)
    fastest = export_from(source, tmp_path / "fastest.pte", fastest_form=True, **asked)
    assert fastest.manifest.total_bytes < plain.manifest.total_bytes / 3
    note = next(note for note in fastest.manifest.carried.notes if "fastest form" in note)
    assert "predicted for pixel-8: " in note
    assert all(f"{form} " in note for form in ("float", "int8_dynamic", "int4"))
    (before,), (after,) = (predict_calls(Artifact.load(each.path), "pixel-8") for each in (plain, fastest))
    assert after.latency_ms < before.latency_ms


def test_without_a_device_the_forms_are_timed_here_and_those_that_do_not_fit_are_named() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    pixels = torch.randn(4, 3, 12, 12)
    source = Exportable(net, pixels, [pixels])
    chosen = choose_fastest(replace(source, carried=Carried.model_construct(notes=())))
    note = chosen.carried.notes[-1] if chosen.carried else ""
    assert "measured on " in note
    assert all(f"{form} " in note for form in ("float", "int8"))
    assert all(f"{form} is not possible: " in note for form in ("int4", "int8_dynamic"))  # there is no linear
    assert not isinstance(net, Static8)
    assert type(net[0].weight) is nn.Parameter


def test_a_quantized_model_has_no_other_form() -> None:
    pixels = torch.randn(4, 3, 8, 8)
    convolution = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 32)).eval()
    for technique in (Int8(), Int8Dynamic()):
        model = apply(nn.Sequential(*convolution), technique, Sample.of(pixels))
        with pytest.raises(EdgetuneError, match="the model is quantized already"):
            choose_fastest(Exportable(model, pixels))
