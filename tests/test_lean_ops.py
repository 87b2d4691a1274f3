from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.lean.packing import dropout_noise, from_rows, make_generator, pack_bits, to_rows, unpack_bits
from support.lean_models import Call, agree, extra_saved_bytes, gradients, leaf, make_lean

torch.set_num_threads(1)


def layouts(dtype: torch.dtype) -> list[Tensor]:
    """Contiguous, odd, channels last, transposed, cut out, expanded, long enough for several pieces, a scalar."""
    plain = [
        torch.randn(4, 8),
        torch.randn(3, 5, 7),
        torch.randn(2, 6, 5, 3).contiguous(memory_format=torch.channels_last),
        torch.randn(5, 9).t(),
        torch.randn(6, 10)[::2, 1:8],
        torch.randn(1, 7).expand(5, 7),
        torch.randn(3, 2**16 + 5),
        torch.randn(()),
    ]
    return [(x * 4).to(dtype).requires_grad_() for x in plain]


# Packing


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_bits_come_back(count: int) -> None:
    mask = torch.rand(count) < 0.4
    bits = pack_bits(mask)
    assert bits.nbytes == (count + 7) // 8
    assert torch.equal(unpack_bits(bits, count) != 0, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_in_8_bits_are_within_half_a_step(dtype: torch.dtype) -> None:
    x = (torch.randn(6, 300) * torch.logspace(-6, 6, 6).unsqueeze(1)).to(dtype)
    x[2] = 0
    steps, scale = to_rows(x)
    assert steps.nbytes + scale.nbytes == 6 * 300 + 6 * 4
    peak = x.abs().amax(1, keepdim=True).double()
    assert bool(((from_rows(steps, scale, torch.float64) - x.double()).abs() <= peak / 254 * 1.0001).all())


def test_dropout_noise_has_the_share_and_the_mean_that_were_asked_for() -> None:
    noise = dropout_noise(400_003, 0.3, torch.float32, make_generator(1, torch.device("cpu")))
    assert noise.eq(0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    assert noise.unique().numel() == 2
    assert noise.mean().item() == pytest.approx(1, abs=0.01)
    rare = dropout_noise(400_000, 0.001, torch.float32, make_generator(1, torch.device("cpu")))
    assert 300 < int(rare.eq(0).sum()) < 500


# Activations

CLAMPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "relu method": lambda x: x.relu(),
    "relu in place": lambda x: functional.relu(x * 1, inplace=True),
    "relu_": lambda x: torch.relu_(x * 1),
    "relu6": functional.relu6,
    "relu6 in place": nn.Sequential(nn.Identity(), nn.ReLU6(inplace=False)),
    "hardtanh in place": lambda x: functional.hardtanh(x * 1, 0.0, 2.5, inplace=True),
    "hardtanh": functional.hardtanh,
}


@pytest.mark.parametrize("name", CLAMPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_clamps_are_exact(name: str, dtype: torch.dtype) -> None:
    for x in layouts(dtype):
        agree(CLAMPS[name], x, tolerance=0)


@pytest.mark.parametrize("name", ["relu", "relu6", "relu in place", "hardtanh in place"])
def test_clamps_keep_one_bit(name: str) -> None:
    x = leaf(5, 13)
    assert extra_saved_bytes(make_lean(CLAMPS[name]), x) == 9
    assert extra_saved_bytes(Call(CLAMPS[name]), x) == 5 * 13 * 4


def test_a_clamp_in_place_changes_a_view_of_its_base() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        functional.relu(y[:, :3], inplace=True)
        return y

    agree(function, leaf(4, 6))


SMOOTH: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {  # with the bound of the derivative's error
    "gelu": (functional.gelu, 1 / 402),
    "gelu tanh": (lambda x: functional.gelu(x, approximate="tanh"), 1 / 402),
    "silu": (functional.silu, 1 / 422),
    "silu in place": (lambda x: functional.silu(x * 1, inplace=True), 1 / 422),
    "hardswish": (functional.hardswish, 1 / 254),
    "hardswish in place": (lambda x: functional.hardswish(x * 1, inplace=True), 1 / 254),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_activations_in_8_bits_keep_one_byte_within_their_bound(name: str) -> None:
    function, bound = SMOOTH[name]
    for x in [*layouts(torch.float32), torch.linspace(-12, 12, 20_001, requires_grad=True)]:
        expected, (wanted,) = gradients(function, (x,))
        got, (found,) = gradients(make_lean(function, "8bit"), (x,))
        assert torch.equal(got, expected)
        gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).abs()
        assert bool(((found - wanted).abs() <= gradient * (bound + 1e-6)).all())
    x = leaf(5, 13)
    assert extra_saved_bytes(make_lean(function, "8bit"), x) == 5 * 13
    as_pytorch = 5 * 13 * 4  # the input
    assert extra_saved_bytes(make_lean(function), x) == extra_saved_bytes(Call(function), x) == as_pytorch


def test_an_8_bit_activation_passes_far_gradients_exactly() -> None:
    x = torch.tensor([-40.0, 40.0], requires_grad=True)
    for function, _ in SMOOTH.values():
        assert torch.autograd.grad(make_lean(function, "8bit")(x).sum(), x)[0].tolist() == pytest.approx(
            [0, 1], abs=1e-6
        )


# Dropout


@pytest.mark.parametrize("in_place", [False, True])
def test_dropout_keeps_a_seed_and_its_gradient_has_the_same_mask(in_place: bool) -> None:
    model = make_lean(lambda x: functional.dropout(x * 1, 0.25, inplace=in_place))
    for x in layouts(torch.float32):
        y = model(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(y, gradient * x)
        assert bool(((gradient == 0) | ((gradient - 4 / 3).abs() < 1e-6)).all())
    assert extra_saved_bytes(model, leaf(8, 9)) == 0
    torch.manual_seed(5)
    first = model(leaf(8, 9))
    assert not torch.equal(model(leaf(8, 9)), first)
    torch.manual_seed(5)
    assert torch.equal(model(leaf(8, 9)), first)


def test_dropout_is_the_identity_without_training_or_p() -> None:
    x = leaf(4, 4)
    for function in (lambda x: functional.dropout(x, 0.5, training=False), lambda x: functional.dropout(x, 0.0)):
        assert torch.equal(make_lean(function)(x), x)
    assert make_lean(lambda x: functional.dropout(x, 1.0))(x).count_nonzero() == 0
