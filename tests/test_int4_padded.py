"""int4: widths that the group does not divide, presets, and models that are odd."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgetune.core.apply import apply
from edgetune.core.errors import EdgetuneError
from edgetune.core.technique import Sample
from edgetune.export import export
from edgetune.quant.int4 import Int4
from edgetune.quant.int8_dynamic import Int8Dynamic
from edgetune.quant.padded import PaddedLinear
from edgetune.quant.size import parameter_count, weight_bits

torch.set_num_threads(1)


class Odd(nn.Module):
    """Widths of 40 and 96; the narrow layer is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(96, 40), nn.Linear(40, 40)
        self.again, self.head = self.narrow, nn.Linear(40, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.again(self.narrow(self.wide(x).relu()).relu()).relu())
        return y


def odd() -> Odd:
    torch.manual_seed(0)
    return Odd().eval()


def rows(count: int = 40) -> torch.Tensor:
    return torch.randn(count, 96, generator=torch.Generator().manual_seed(1))


def bits_of(model: nn.Module) -> dict[str, int | None]:
    return {
        name: weight_bits(m.weight) for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))
    }


@pytest.mark.parametrize("settings", [{}, {"group_size": "channel"}, {"algorithm": "gptq"}], ids=str)
def test_a_padded_layer_computes_what_it_did_and_so_does_its_program(settings: dict[str, Any], tmp_path: Path) -> None:
    model, plain, x = odd(), odd(), rows()
    apply(model, Int4(pad=True, **settings), Sample.of(x))
    assert bits_of(model) == {"wide": 4, "narrow": 4, "head": 4}
    assert model.again is model.narrow
    assert model.narrow.weight.shape == (40, 64)
    weight: Any = model.narrow.weight
    assert not weight.qdata[:, 40:].any()
    assert parameter_count(model) == parameter_count(plain)
    dense = copy.deepcopy(plain)
    with torch.no_grad():
        for name in ("wide", "narrow", "head"):
            layer, unpacked = dense.get_submodule(name), model.get_submodule(name).weight.dequantize()
            layer.weight.copy_(unpacked[:, : layer.in_features])
        assert (model(x) - dense(x)).norm() < 0.02 * dense(x).norm(), "but for 8 bits of activations"
    artifact = export(model, x[:1], tmp_path / "model.pte", check_inputs=[x], one_row=True)
    assert artifact.manifest.main.parity is not None
    assert artifact.manifest.main.parity.max_abs_difference < 1e-5
    assert artifact.manifest.main.delegated_macs_pct == 100.0


def test_a_padded_model_loads_its_state() -> None:
    model, other = (Int4(pad=True).apply(odd()) for _ in range(2))
    with torch.no_grad():
        other.head.weight = nn.Parameter(torch.zeros(5, 64), requires_grad=False)
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert torch.equal(model(rows()), other(rows()))
    rebuilt = Int4(pad=True).rebuild(odd(), model.state_dict())
    rebuilt.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(model(rows()), rebuilt(rows()))


def test_a_layer_that_does_not_fit_gets_8_bits_and_is_named() -> None:
    model = odd()
    with pytest.warns(
        UserWarning, match=r"int4: narrow, head: .*not a multiple of 32.*8 bits.*pad: true.*skip:"
    ) as caught:
        apply(model, Int4())
    assert caught[0].filename == __file__
    assert bits_of(model) == {"wide": 4, "narrow": 8, "head": 8}
    expected = odd()(rows())
    assert (model(rows()) - expected).norm() < 0.2 * expected.norm()


class OwnLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input)


def test_a_linear_of_ones_own_is_not_padded() -> None:
    model = nn.ModuleDict({"good": nn.Linear(64, 8), "own": OwnLinear(40, 8)})
    with pytest.warns(
        UserWarning, match=r"own: .*8 bits instead of 4. To change this: prune with round_to=32; or skip"
    ):
        Int4(pad=True).apply(model)
    assert bits_of(model) == {"good": 4, "own": 8}


def test_padding_is_taken_back_if_the_calibration_fails() -> None:
    model = odd()
    weight = model.narrow.weight
    with pytest.raises(EdgetuneError, match="not finite on the calibration batches"):
        apply(model, Int4(pad=True), Sample.of(rows() * torch.nan))
    assert model.narrow.weight is weight
    assert not any(isinstance(module, PaddedLinear) for module in model.modules())
    assert model.state_dict().keys() == odd().state_dict().keys()


@pytest.mark.parametrize("empty", [[], [rows()[:0]]], ids=["no batch", "no rows"])
def test_calibration_rows_that_are_missing_are_an_error(empty: list[torch.Tensor]) -> None:
    with pytest.raises(EdgetuneError, match="no calibration batches, or they have no rows"):
        apply(odd(), Int4(pad=True), Sample(rows()[:1], lambda: iter(empty)))


@pytest.mark.parametrize("technique", [Int4(), Int8Dynamic()], ids=str)
def test_a_model_that_is_quantized_already_is_refused(technique: Int4 | Int8Dynamic) -> None:
    model = Int8Dynamic().apply(odd())
    with pytest.raises(EdgetuneError, match=r"quantized already: got 'wide, narrow, head in integers"):
        technique.apply(model)


def test_weights_that_are_not_finite_are_refused_before_anything_changes() -> None:
    model = odd()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.inf
    with pytest.raises(EdgetuneError, match=r"head: a weight is NaN or infinite"):
        Int4(pad=True).apply(model)
    assert type(model.wide.weight) is nn.Parameter


def test_a_layer_below_one_group_and_constant_channels_quantize() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[0].weight[0], model[0].weight[1] = 0.0, 0.25
    plain, x = copy.deepcopy(model), torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    apply(model, Int4(pad=True), Sample.of(x))
    weight = model[0].weight.dequantize()
    assert not weight[0].any()
    torch.testing.assert_close(weight[1, :5], torch.full((5,), 0.25), rtol=0.05, atol=0)
    assert (model(x) - plain(x)).norm() < 0.2 * plain(x).norm()


def test_presets_are_defaults() -> None:
    smallest, closest = Int4(preset="smallest"), Int4(preset="closest", calibration_batches=3)
    assert (smallest.group_size, smallest.embeddings, smallest.algorithm) == ("channel", "int4", "auto")
    assert Int4(preset="fastest").group_size == "channel"
    assert Int4(preset="smallest", embeddings="none").embeddings == "none"
    assert (closest.algorithm, closest.calibration_batches, closest.needs) == ("gptq", 3, "batches")
    assert Int4.model_validate(closest.model_dump()) == closest
    with pytest.raises(EdgetuneError, match=r"preset.*got 'best'"):
        Int4(preset="best")  # type: ignore[arg-type]


def test_the_closest_keeps_the_head_in_8_bits() -> None:
    model, x = odd(), rows()
    apply(model, Int4(preset="closest", pad=True), Sample.of(x))
    assert bits_of(model) == {"wide": 4, "narrow": 4, "head": 8}
    apply(model := odd(), Int4(preset="closest", pad=True, int8_linears=("wide",)), Sample.of(x))
    assert bits_of(model) == {"wide": 8, "narrow": 4, "head": 4}
    apply(model := odd(), Int4(preset="closest", pad=True, skip=("head",)), Sample.of(x))
    assert bits_of(model)["head"] is None


@pytest.mark.parametrize("technique", [Int4(), Int8Dynamic()], ids=str)
def test_a_linear_of_one_input_stays_in_float_and_is_named(technique: Int4 | Int8Dynamic) -> None:
    model = nn.Sequential(nn.Linear(1, 64), nn.Linear(64, 3)).eval()
    with pytest.warns(UserWarning, match=r"0: a linear with a single input stays in floating point.*skip: \['0'\]"):
        apply(model, technique)
    assert bits_of(model) == {"0": None, "1": 4 if isinstance(technique, Int4) else 8}
    assert model(torch.randn(5, 1)).shape == (5, 3)
    padded = Int4(pad=True).apply(nn.Sequential(nn.Linear(1, 64), nn.Linear(64, 3)).eval())
    assert bits_of(padded) == {"0": 4, "1": 4}
    assert padded(torch.randn(5, 1)).shape == (5, 3)
