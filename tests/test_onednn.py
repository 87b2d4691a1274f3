"""Products and convolutions by oneDNN equal PyTorch's own, and are left alone where they do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.lean import onednn
from edgetune.lean.frozen_ops import convolution_input_gradient
from edgetune.lean.operators import LeanOperators

torch.set_num_threads(1)
SHAPES = [(2048, 48, 384), (257, 1536, 384), (300, 384, 1536), (4096, 64, 64)]


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_the_three_products_are_pytorchs(rows: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    gradient = torch.randn(rows, outputs)
    assert onednn.supports(x, weight, bias)
    close(onednn.linear(x, weight, bias), functional.linear(x, weight, bias))
    close(onednn.input_gradient(gradient, weight), gradient @ weight)
    found = onednn.weight_gradient(gradient, x)
    close(found, gradient.t() @ x)
    assert found.is_contiguous()


def test_batches_strides_and_empty_batches() -> None:
    x, weight = torch.randn(7, 40, 3, 256)[:, :, 1], torch.randn(256, 1024)[:, ::4]
    close(onednn.linear(x, weight), functional.linear(x, weight))
    close(onednn.weight_gradient(x, x), x.flatten(0, 1).t() @ x.flatten(0, 1))
    assert onednn.linear(torch.randn(0, 256), torch.randn(9, 256)).shape == (0, 9)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.ones(4, 8), torch.ones(3, 8)),  # small
        (torch.ones(2048, 1024).double(), torch.ones(64, 1024).double()),
        (torch.ones(2048, 1024).bfloat16(), torch.ones(64, 1024).bfloat16()),
        (torch.ones(2048, 1024, device="meta"), torch.ones(64, 1024, device="meta")),
    ],
)
def test_what_does_not_fit_goes_to_pytorch(x: Tensor, weight: Tensor) -> None:
    assert not onednn.supports(x, weight)
    found = onednn.linear(x, weight)
    assert found.dtype == x.dtype
    assert found.device == x.device
    if not x.is_meta:
        assert torch.equal(found, functional.linear(x, weight))


def test_wrong_shapes_get_pytorchs_error() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        onednn.linear(torch.randn(2048, 512), torch.randn(512, 256))


@pytest.mark.filterwarnings("ignore:TF32")
def test_switched_off_it_is_not_used() -> None:
    x, weight = torch.randn(2048, 256), torch.randn(256, 256)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.supports(x, weight)
    assert onednn.supports(x, weight)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_the_gradient_of_a_convolutions_input(
    stride: int, padding: int, dilation: int, groups: int, dimensions: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, *[11, 10, 9][:dimensions], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 4 // groups, *[3, 2, 3][:dimensions], dtype=torch.float64)
    settings = ([stride] * dimensions, [padding] * dimensions, [dilation] * dimensions, False, [0] * dimensions, groups)
    y = torch.convolution(x, weight, None, *settings)
    gradient = torch.randn_like(y)
    (wanted,) = torch.autograd.grad(y, x, gradient)
    torch.testing.assert_close(convolution_input_gradient(gradient, weight, x.shape, settings), wanted)


class Viewing(nn.Module):
    """Written for the usual layout: `view` on what a convolution gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, groups=4)
        self.head = nn.Linear(4 * 6 * 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu())
        return self.head(x.view(x.size(0), -1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_that_views_its_pictures(frozen: bool) -> None:
    torch.manual_seed(0)
    model, x = Viewing(), torch.randn(2, 3, 8, 8)
    for layer in (model.first, model.second) if frozen else ():
        layer.requires_grad_(False)
    wanted = model(x)
    wanted.square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    LeanOperators().put_on(model)
    found = model(x)
    close(found, wanted)
    found.square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name not in expected)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_what_a_convolution_gives_is_laid_out_channels_last() -> None:
    x = onednn.channels_last(torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3))
    assert onednn.is_channels_last(x)
    assert onednn.is_channels_last(torch.nn.functional.conv2d(x, torch.randn(4, 3, 3, 3)))
    assert not onednn.is_channels_last(torch.randn(2, 3, 8, 8))
    double = torch.randn(2, 3, 8, 8).double()
    assert onednn.channels_last(double, torch.randn(4, 3, 3, 3).double()) is double


def test_channels_keep_the_layout() -> None:
    x, indices = torch.randn(2, 6, 5, 4), torch.tensor([1, 4])
    assert torch.equal(onednn.select_channels(x, indices), x[:, indices])
    last = x.contiguous(memory_format=torch.channels_last)
    found = onednn.select_channels(last, indices)
    assert torch.equal(found, x[:, indices])
    assert onednn.is_channels_last(found)


def test_a_picture_comes_back_as_the_model_would_lay_it_out() -> None:
    model, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    whole = nn.Sequential(model)
    LeanOperators().put_on(whole)
    assert whole(x).view(2, -1).shape == (2, 4 * 36)
    assert onednn.is_channels_last(whole(x.contiguous(memory_format=torch.channels_last)))
