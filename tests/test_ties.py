"""How far a model moves by rounding ties alone, beside its program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgetune as et
from edgetune.report.tables import program_table
from edgetune.runtime.ties import NOISE, measure_ties
from support.laws import bert, mlp, tokens, vectors
from support.reports import example


def outputs_of(model: nn.Module) -> Any:
    return lambda row: {"logits": model(*row)}


@torch.no_grad()
def test_a_model_that_rounds_no_activations_has_no_ties() -> None:
    assert measure_ties(mlp(), [(vectors(),)], outputs_of(mlp())) is None  # type: ignore[list-item]
    quantized = et.apply(mlp(), et.Int8Dynamic())
    assert measure_ties(quantized, [], outputs_of(quantized)) is None


class Steps(nn.Module):
    """Codes of its input, as a linear with weights of one shows them: the range is 255, so codes are whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 2, bias=False)
        nn.init.ones_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@torch.no_grad()
def test_ties_are_the_activations_that_noise_rounds_the_other_way() -> None:
    model = et.apply(Steps(), et.Int8Dynamic())
    values = torch.arange(32.0).repeat(64, 1)
    values[:, 0], values[:, 31] = 0.0, 255.0  # the range, which noise hardly moves
    clear = measure_ties(model, [(values,)], outputs_of(model))
    values[:, 1:9] = torch.arange(1, 9) + 0.5  # each between two codes
    tied = measure_ties(model, [(values,)], outputs_of(model))
    assert clear is not None
    assert tied is not None
    assert (clear.activations, clear.changed) == (64 * 32, 0)
    assert 0.25 * 64 * 8 < tied.changed < 0.75 * 64 * 8, "noise moves half of them across"
    assert clear.max_relative_difference < 10 * NOISE < tied.max_relative_difference
    assert not model.linear._forward_pre_hooks
    again = measure_ties(model, [(values,)], outputs_of(model))
    assert again == tied


def test_a_program_is_compared_with_what_ties_alone_do(tmp_path: Path) -> None:
    inputs = tokens()
    plain = et.export(bert(), inputs, tmp_path / "plain.pte")
    assert plain.manifest.main.parity is not None
    assert plain.manifest.main.parity.ties is None
    model = et.apply(bert(), et.Int4(), et.Sample.of(inputs))
    artifact = et.export(model, inputs, tmp_path / "int4.pte", min_same_prediction_pct=0)
    parity = artifact.manifest.main.parity
    assert parity is not None
    assert parity.ties is not None
    rows, width, linears = 4 * 10, 32, 2 * 6  # of each block: queries, keys, values, output, up; down has 64 inputs
    assert parity.ties.activations == rows * (linears * width + 2 * width) + 4 * (width + width)
    assert 0 <= parity.ties.changed < 0.01 * parity.ties.activations
    table = program_table(example().with_(program=artifact.program()), brief=True)
    assert table is not None
    (line,) = [str(row) for row in table.rows if "PyTorch, by rounding ties" in str(row)]
    assert f"of {parity.ties.activations:,} 8-bit activations lie between two codes" in line


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_noise_is_drawn_anew_for_each_row_and_the_model_stays(batch: int) -> None:
    model = et.apply(mlp(), et.Int8Dynamic())
    rows = [(vectors()[:batch],), (vectors()[:batch],)]  # type: ignore[index]
    before = model(*rows[0])
    ties = measure_ties(model, rows, outputs_of(model))
    assert ties is not None
    assert ties.predictions == 2 * batch
    assert torch.equal(model(*rows[0]), before)
