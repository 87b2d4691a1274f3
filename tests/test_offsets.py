"""offsets: the zero points of groups of weights, multiplied apart before the rest gets 4 bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgetune as et
from edgetune.core.errors import EdgetuneError
from edgetune.core.technique import Technique
from edgetune.export import export
from edgetune.quant.size import parameter_count, stored_bytes, weight_bits
from edgetune.quant.split import SplitLinear, group_means

torch.set_num_threads(1)
GROUP = 32


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()


def rows(count: int = 40) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(1))


def with_zero_points(layer: nn.Linear) -> None:
    """Give it weights `s q + m` of 16 codes q in each group, as a file in Q4_1 has them."""
    generator = torch.Generator().manual_seed(2)
    shape = (layer.out_features, layer.in_features // GROUP, GROUP)
    codes = torch.randint(0, 16, shape, generator=generator).float()
    codes[..., 0], codes[..., 1] = 0, 15
    scales, least = (torch.rand(2, *shape[:2], 1, generator=generator) + 0.1) * torch.tensor([0.02, -0.2]).view(
        2, 1, 1, 1
    )
    layer.weight.data = (scales * codes + least).flatten(1)


def bits_of(model: nn.Module) -> dict[str, int | None]:
    return {name: weight_bits(m.weight) for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def lost(model: nn.Module, plain: nn.Module) -> float:
    with torch.no_grad():
        return float((model(rows()) - plain(rows())).norm() / plain(rows()).norm())


def test_the_outputs_and_the_parameters_stay() -> None:
    model = et.apply(net(), et.Offsets())
    first: Any = model[0]
    assert type(first) is SplitLinear
    assert first.offset.weight.shape == (96, 2)
    assert lost(model, net()) < 1e-6
    assert parameter_count(model) == parameter_count(net())
    means = group_means(rows(), 2)
    torch.testing.assert_close(means, torch.stack([rows()[:, :32].mean(-1), rows()[:, 32:].mean(-1)], -1))


def test_weights_that_have_zero_points_are_stored_almost_as_they_were(tmp_path: Path) -> None:
    plain = net()
    for layer in (plain[0], plain[2]):
        with_zero_points(layer)  # type: ignore[arg-type]
    symmetric = et.apply(copy.deepcopy(plain), et.Int4(algorithm="mse"))
    model = et.apply(copy.deepcopy(plain), [et.Offsets(), et.Int4(algorithm="mse")])
    eight = et.apply(copy.deepcopy(plain), et.Int8Dynamic())
    assert lost(model, plain) < 0.2 * lost(symmetric, plain)
    assert lost(model, plain) < 2 * lost(eight, plain), "what is lost, activations in 8 bits lose"
    assert bits_of(model) == {"0": 4, "0.offset": 8, "2": 4, "2.offset": 8}
    offsets = sum(part.weight.numel() + 4 * part.out_features for part in (model[0].offset, model[2].offset))  # type: ignore[union-attr, operator, misc]
    assert stored_bytes(model) == stored_bytes(symmetric) + offsets
    artifact = export(model, rows(1), tmp_path / "model.pte", check_inputs=[rows()], one_row=True)
    parity = artifact.manifest.main.parity
    assert parity is not None
    assert parity.max_relative_difference is not None
    assert parity.max_relative_difference < 0.02, "ties of rounding activations"


def test_the_inputs_that_outliers_took_do_not_count() -> None:
    x = rows()
    x[:, 5] *= 50
    plain = net()
    plain[0].weight.data[:, 5] = 9.0
    split = et.apply(copy.deepcopy(plain), et.Outliers(share=0.03, targets=("0",)), sample=et.Sample.of(x))
    model: Any = et.apply(split, et.Offsets(targets=("0",)))
    assert 5 in model[0].columns.tolist()
    assert float(model[0].offset.weight.detach().abs().max()) < GROUP * 0.1
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("later", "groups"), [(et.Int4(group_size=64), 1), (et.Int4(group_size="channel"), 2)], ids=str
)
def test_groups_are_those_of_the_step_that_follows(later: Technique, groups: int) -> None:
    model: Any = et.apply(net()[:1], [et.Offsets(), later])
    assert model[0].offset.in_features == groups
    assert weight_bits(model[0].offset.weight) == (8 if groups > 1 else None)  # no kernel has a single input


def test_a_layer_that_groups_do_not_divide_stays_whole_and_is_named() -> None:
    with pytest.warns(
        UserWarning, match=r"offsets: 2: groups of 64 do not divide their width.*skip: \['2'\]"
    ) as caught:
        model = et.apply(net(), et.Offsets(group_size=64))
    assert caught[0].filename == __file__
    assert [type(layer) for layer in (model[0], model[2])] == [SplitLinear, nn.Linear]  # type: ignore[index]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([et.Offsets(), et.Offsets()], "0 has offsets already"),
        ([et.Offsets(), et.Outliers()], "cannot follow offsets, which leaves split linears"),
        ([et.Int4(), et.Offsets()], "cannot follow int4, which leaves integer weights"),
        ([et.Offsets(), et.LoRA(targets=("0",))], "next: put lora before offsets"),
        ([et.Offsets(targets=("nothing",))], "targets: the pattern matches no layer"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_by_name(steps: list[Technique], message: str) -> None:
    with pytest.raises(EdgetuneError, match=message):
        et.apply(net(), steps, sample=et.Sample.of(rows()))


def test_infinite_weights_are_refused() -> None:
    model = net()
    model[2].weight.data[0, 0] = torch.nan
    with pytest.raises(EdgetuneError, match="2: a weight is NaN or infinite"):
        et.apply(model, et.Offsets())
    assert type(model[0]) is nn.Linear
