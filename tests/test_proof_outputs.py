"""Every output of a program by its name: states, tensors of any kind, what a model keeps inside, what is no tensor."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.inputs import logits_of
from edgetune.core.outputs import named_outputs
from edgetune.core.quiet import silence_libraries
from edgetune.core.technique import Sample
from edgetune.export import export
from edgetune.export.methods import export_methods
from edgetune.quant.int8 import Int8
from support.proofs import Stream, draw, held, one_logit, seeded

with silence_libraries():  # libraries that these load warn on import
    pass


class Detector(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.scores, self.boxes = form, nn.Linear(8, 5), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        scores, boxes = self.scores(x), self.boxes(x).sigmoid()
        if self.form == "dict":
            return {"boxes": boxes, "logits": scores, "nothing": None}
        if self.form == "fields":
            return Detection(scores, boxes)
        return (scores, boxes) if self.form == "tuple" else (scores, [boxes, {"best": scores.argmax(-1)}])


@dataclasses.dataclass
class Detection:
    logits: Tensor
    boxes: Tensor


FORMS = {
    "tuple": ["output_0", "output_1"],
    "dict": ["boxes", "logits"],
    "fields": ["logits", "boxes"],
    "nested": ["output_0", "output_1.0", "output_1.1.best"],
}


def test_every_output_is_there_by_its_name(tmp_path: Path) -> None:
    models, x = {form: seeded(Detector, form) for form in FORMS}, draw(2, 8)
    artifact = export(models["nested"], x, tmp_path / "m.pte")
    assert list(held(models["nested"], x, artifact)) == FORMS["nested"]
    methods = export_methods({form: (model, x) for form, model in models.items()}, tmp_path / "methods.pte")
    calls = {**{call.name: call for call in methods.manifest.calls}, "nested, alone": artifact.manifest.main}
    for name, call in calls.items():
        form = name.partition(",")[0]
        names = FORMS[form]
        assert [output.name for output in call.outputs] == names
        assert call.parity is not None
        assert [output.name for output in call.parity.outputs] == names
        assert logits_of(models[form](x)).shape == (2, 5)


def test_states_go_in_and_come_out(tmp_path: Path) -> None:
    model, x, h = seeded(Stream), draw(1, 5, 8), torch.zeros(2, 1, 16)
    artifact = export(model, (x, h), tmp_path / "m.pte")
    assert [spec.shape for spec in artifact.manifest.main.inputs] == [(1, 5, 8), (2, 1, 16)]
    assert [spec.shape for spec in artifact.manifest.main.outputs] == [(1, 5, 4), (2, 1, 16)]
    with torch.no_grad():
        expected = model(*[x[:, :3], h])
        expected = model(x, expected[1])
    state = model(x[:, :3], h)[1].detach()
    got = artifact.run((x, state))
    assert torch.allclose(got[0], expected[0], atol=1e-5)
    assert torch.allclose(got[1], expected[1], atol=1e-5)


class Second(nn.Module):
    """Only its second output is wrong where it is captured."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x + 0.1 if torch.compiler.is_exporting() else x + 0.0


def test_a_wrong_second_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match="output output_1 of the program differs"):
        export(Second().eval(), draw(2, 8), tmp_path / "m.pte")


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.register_buffer("fixed", torch.arange(3.0))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.layer(x)
        return {
            "y": y, "input": x, "again": y, "view": y[:, :2], "turned": y.mT, "constant": self.fixed, "empty": y[:, :0],
            "parameter": self.layer.bias, "by value": x[:, :4].relu() * self.layer.bias, "sum": y.sum(),
            "positive": y > 0, "best": y.argmax(-1), "two best": y.topk(2).indices, "zero": y.relu() * 0,
        }  # fmt: skip


def test_odd_outputs(tmp_path: Path) -> None:
    """A bias that is read by its value beside its layer ended the process: XNNPACK packs it and drops it."""
    model, x = seeded(Odd), draw(3, 8)
    artifact = export(model, x, tmp_path / "m.pte")
    held(model, x, artifact)
    alone = nn.Identity()
    held(alone, x, export(alone, x, tmp_path / "alone.pte"))


class Counting(nn.Module):
    """Keeps a state of its own; `writes` into its input, too."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes = writes
        self.register_buffer("total", torch.zeros(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x)
        return (x.add_(1) if self.writes else x + 1) * self.total


def test_a_model_with_a_state_inside_stays_as_it_was(tmp_path: Path) -> None:
    model, rows = Counting(False).eval(), [draw(2, 8, seed=seed) for seed in range(3)]
    artifact = export(model, rows[0], tmp_path / "m.pte", check_inputs=rows)
    assert torch.equal(model.total, torch.zeros(2, 8))
    assert artifact.manifest.main.parity is not None
    assert artifact.manifest.main.parity.max_abs_difference < 1e-6
    assert torch.allclose(artifact.run(rows[1])[0], (rows[1] + 1) * rows[1])
    before = rows[0].clone()
    with pytest.raises(EdgetuneError, match=r"writes into its inputs.*\['input 0'\][\s\S]*x\.clone\(\)"):
        export(Counting(True).eval(), rows[0], tmp_path / "m.pte")
    assert torch.equal(rows[0], before)


def test_what_is_no_tensor_is_refused_by_its_name(tmp_path: Path) -> None:
    class Counted(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"y": x * 2, "count": 3}

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    for model, message in ((Counted(), r"output count is not a tensor[\s\S]*export_methods"), (Nothing(), "no tensor")):
        with pytest.raises(EdgetuneError, match=message) as caught:
            export(model.eval(), draw(2, 8), tmp_path / "m.pte")
        assert caught.value.exit_code == Exit.EXPORT
    with pytest.raises(EdgetuneError, match=r"does not run on the example inputs: RuntimeError: [\s\S]*\(2, 9\)"):
        export(seeded(one_logit), draw(2, 9), tmp_path / "m.pte")


def test_a_statically_quantized_model_keeps_its_outputs(tmp_path: Path) -> None:
    x = draw(16, 8)
    model = Int8().apply(seeded(Detector, "dict"), Sample.of(x))
    with torch.no_grad():
        assert list(named_outputs(model(x))) == list(named_outputs(seeded(Detector, "dict")(x)))
    artifact = export(model, x, tmp_path / "m.pte")
    held(model, x, artifact)
