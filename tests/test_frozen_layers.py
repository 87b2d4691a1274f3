"""Frozen layers: gradients of autograd, with less saved for backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from edgetune.lean.frozen import FrozenLayer

CONVOLUTIONS = [
    nn.Conv1d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2), bias=False),
    nn.Conv2d(4, 8, (3, 2), dilation=(2, 1), groups=2),
    nn.Conv2d(4, 4, 3, groups=4, padding="same"),
    nn.Conv2d(4, 6, 4, padding="same", dilation=2),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(4, 6, 3, padding="valid"),
    nn.Conv3d(4, 2, 2, stride=(1, 2, 1)),
]


NORMS = [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.LayerNorm(9), nn.GroupNorm(2, 4)]


def saved_by(run: Any) -> tuple[Tensor, list[tuple[int, ...]]]:
    shapes: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        return run(), shapes


def picture_for(layer: nn.Module) -> Tensor:
    dimensions = 3 if isinstance(layer, nn.Conv3d) else 1 if isinstance(layer, (nn.Conv1d, nn.BatchNorm1d)) else 2
    return torch.randn(2, 4, *[9] * dimensions)


@pytest.mark.parametrize("layer", [*CONVOLUTIONS, *NORMS], ids=str)
@pytest.mark.parametrize("x_trains", [True, False])
@pytest.mark.parametrize("bias_trains", [True, False])
def test_frozen_layers_agree_with_autograd_and_keep_no_input(layer: Any, x_trains: bool, bias_trains: bool) -> None:
    torch.manual_seed(0)
    plain = copy.deepcopy(layer).eval()
    plain.reset_parameters()
    if getattr(plain, "running_mean", None) is not None:
        nn.init.uniform_(plain.running_mean)
        nn.init.uniform_(plain.running_var, 0.5, 2.0)
    plain.weight.requires_grad_(False)
    if plain.bias is not None:
        plain.bias.requires_grad_(bias_trains)
    frozen = copy.deepcopy(plain).train()  # a frozen batch norm stays on its statistics
    FrozenLayer().put_on(frozen)
    x = picture_for(layer)
    inputs = [x.clone().requires_grad_(x_trains) for _ in range(2)]
    expected = plain(inputs[0])
    got, shapes = saved_by(lambda: frozen(inputs[1]))
    torch.testing.assert_close(got, expected)
    if not expected.requires_grad:
        assert not shapes
        return
    gradient = torch.randn_like(expected)
    expected.backward(gradient)
    got.backward(gradient)
    if x_trains:
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    if plain.bias is not None and bias_trains:
        torch.testing.assert_close(frozen.bias.grad, plain.bias.grad)
    # the gradient of a layer or group norm's input needs the input, and so does that of a reflecting padding
    if not (x_trains and (isinstance(layer, (nn.LayerNorm, nn.GroupNorm)) or "reflect" in str(layer))):
        assert all(shape == tuple(layer.weight.shape) or max(shape) <= 4 for shape in shapes), shapes


def test_a_layer_made_trainable_later_trains() -> None:
    layer = nn.Conv2d(3, 4, 3)
    layer.weight.requires_grad_(False)
    FrozenLayer().put_on(layer)
    layer.weight.requires_grad_(True)
    x = torch.randn(1, 3, 5, 5)
    layer(x).sum().backward()
    expected = torch.autograd.grad(functional.conv2d(x, layer.weight, layer.bias).sum(), layer.weight)[0]
    torch.testing.assert_close(layer.weight.grad, expected)


def test_autocast_reaches_a_frozen_convolution() -> None:
    layer, plain = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    plain.load_state_dict(layer.state_dict())
    for conv in (layer, plain):
        conv.weight.requires_grad_(False)
    FrozenLayer().put_on(layer)
    xs = [torch.ones(1, 3, 5, 5, requires_grad=True) for _ in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys = [conv(x) for conv, x in zip((layer, plain), xs, strict=True)]
    assert ys[0].dtype == ys[1].dtype == torch.bfloat16
    for y in ys:
        y.float().sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
