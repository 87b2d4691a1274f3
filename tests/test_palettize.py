"""palettize: weights on few values by k-means, and what Core ML makes of them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import edgetune as et
from edgetune.capture.positional import Positional
from edgetune.core.errors import EdgetuneError
from edgetune.export.lower import lower
from edgetune.export.targets import find
from edgetune.quant.palettize import Palettize, cluster, has_palette, palettized_layers
from support.target_models import needs


class Net(nn.Module):
    """A convolution with a batch norm, a depthwise one that is too small, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm = nn.Conv2d(3, 96, 3, bias=False), nn.BatchNorm2d(96)
        self.depth, self.head = nn.Conv2d(96, 96, 3, groups=96), nn.Linear(96, 200)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depth(torch.relu(self.norm(self.wide(x)))).mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


IMAGES = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_a_layer_keeps_as_many_values_as_its_codes_have(bits: int) -> None:
    model = net()
    depth = model.depth.weight.clone()
    et.apply(model, [Palettize(bits=bits)])
    assert [len(layer.weight.unique()) for layer in (model.wide, model.head)] == [2**bits] * 2
    assert torch.equal(model.depth.weight, depth)
    assert palettized_layers(model) == ["wide", "head"]
    assert not has_palette(model.norm.weight)


def test_values_are_the_means_of_their_weights_and_each_weight_takes_the_nearest() -> None:
    weight = torch.randn(64, 50, generator=torch.Generator().manual_seed(2)).half().float()
    rounded = cluster(weight, 8)
    values = rounded.unique()
    means = torch.stack([weight[rounded == value].mean() for value in values])
    assert torch.allclose(values, means, atol=0.03)
    nearest = values[(weight.unsqueeze(-1) - values).abs().argmin(-1)]
    assert (nearest == rounded).float().mean() > 0.99
    few = torch.tensor([[0.5, -1.0, 2.0, 0.5]])
    assert torch.equal(cluster(few, 4), few)


def coreml_bytes(model: nn.Module) -> int:
    return len(lower(Positional(model, IMAGES).eval(), (IMAGES,), needs("coreml")).data)


def test_core_ml_stores_codes_and_a_table() -> None:
    """Lowered only: no computer but an Apple one runs it."""
    plain = coreml_bytes(net())
    weights = sum(layer.weight.numel() for layer in (net().wide, net().head))
    sizes = {bits: coreml_bytes(et.apply(net(), [Palettize(bits=bits)])) for bits in (2, 8)}
    for bits, size in sizes.items():
        saved = weights * (16 - bits) / 8
        assert saved - 8000 < plain - size < saved, (bits, plain, size)  # tables, and a batch norm apart
    stored = lower(Positional(et.apply(net(), [Palettize()]), IMAGES).eval(), (IMAGES,), find("coreml")).data
    assert b"constexpr_lut_to_dense" in stored


def test_other_targets_store_them_in_full_with_a_warning(tmp_path: Path) -> None:
    model = et.apply(net(), [Palettize()])
    with pytest.warns(UserWarning, match="xnnpack stores the weights of few values in full, as wide, head:"):
        program = et.export(model, IMAGES, tmp_path / "net.pte")
    assert program.path.stat().st_size > 4 * model.head.weight.numel()


def test_a_layer_that_pads_by_itself_is_palettized_and_one_that_computes_its_weight_refused() -> None:
    class Padded(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))

    model = et.apply(nn.Sequential(Padded(16, 32, 3)), [Palettize(bits=2)])
    assert len(model[0].weight.unique()) == 4
    with pytest.raises(EdgetuneError, match="0 computes its weight"):
        et.apply(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))), [Palettize()])


def test_a_model_of_small_layers_and_one_of_quantized_ones_are_refused() -> None:
    with pytest.raises(EdgetuneError, match="finds no layer of 2,048 weights or more"):
        et.apply(nn.Sequential(nn.Linear(8, 8)), [Palettize()])
    with pytest.raises(EdgetuneError, match=r"head|weights"):
        et.apply(copy.deepcopy(net()), [et.Int8Dynamic(), Palettize()])
