from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.lean.operators import LeanModule, LeanOperators, last_activation
from edgetune.lean.products import restore_columns, save_columns
from support.lean_models import Call, agree, extra_saved_bytes, gradients, leaf, make_lean

torch.set_num_threads(1)


# Softmax and norms


@pytest.mark.parametrize("dim", [-1, 1])
def test_softmax_in_8_bits_is_bounded(dim: int) -> None:
    def function(x: Tensor) -> Tensor:
        return x.softmax(dim)

    x = leaf(3, 11, 6)
    expected, (wanted,) = gradients(function, (x,))
    got, (found,) = gradients(make_lean(function, "8bit"), (x,))
    assert torch.equal(got, expected)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    step, inner = expected.amax(dim, keepdim=True) / 510, (gradient * expected).sum(dim, keepdim=True)
    bound = step * (gradient - inner).abs() + (expected + step) * step * gradient.abs().sum(dim, keepdim=True)
    assert bool(((found - wanted).abs() <= bound + 1e-6).all())
    rows = x.numel() // x.shape[dim]
    assert extra_saved_bytes(make_lean(function, "8bit"), x) == x.numel() + 4 * rows
    masked = torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf]], requires_grad=True)
    assert make_lean(lambda x: x.softmax(-1), "8bit")(masked)[0].tolist() == [1, 0]


NORMS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "layer": (lambda x, w, b: functional.layer_norm(x, (24,), w, b), (1 + leaf(24) / 9, leaf(24))),
    "layer without bias": (lambda x, w: functional.layer_norm(x, (24,), w), (1 + leaf(24) / 9,)),
    "layer without parameters": (lambda x: functional.layer_norm(x, (24,)), ()),
    "layer over two": (lambda x, w, b: functional.layer_norm(x, (5, 24), w, b), (1 + leaf(5, 24) / 9, leaf(5, 24))),
    "rms": (lambda x, w: functional.rms_norm(x, (24,), w), (1 + leaf(24) / 9,)),
    "rms without weight": (lambda x: functional.rms_norm(x, (24,), eps=1e-6), ()),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norms_are_exact_whatever_trains(name: str, dtype: torch.dtype) -> None:
    function, parameters = NORMS[name]
    inputs = [
        leaf(4, 5, 24),
        leaf(24, 5, 4).detach().permute(2, 1, 0).requires_grad_(),
        leaf(4, 5, 48).detach()[..., ::2],
    ]
    for x in inputs:
        for trains in range(2 ** len(parameters)):
            weights = [p.detach().to(dtype).requires_grad_(bool(trains >> i & 1)) for i, p in enumerate(parameters)]
            if x.requires_grad or trains:
                # in bf16 PyTorch's own sums are that rough
                tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
                agree(function, x.detach().to(dtype).requires_grad_(x.requires_grad), *weights, tolerance=tolerance)


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_norms_share_what_they_keep_with_the_linear_after_them(name: str) -> None:
    function, parameters = NORMS[name]
    weights = [p.detach() for p in parameters]

    def both(x: Tensor, matrix: Tensor) -> Tensor:
        return functional.linear(function(x * 1, *weights), matrix)

    for trains in (True, False):
        model, plain = Call(both, torch.randn(7, 24)), Call(both, torch.randn(7, 24))
        model.weights.requires_grad_(trains), plain.weights.requires_grad_(trains)
        LeanOperators().put_on(model)
        outside = 4 * 24 * len(weights)  # a frozen weight and bias, which are not the model's own here
        rest = 4 * 20 * (2 if name == "layer" else 1)  # PyTorch keeps the mean, too
        assert extra_saved_bytes(model, leaf(4, 5, 24)) == 4 * 20 * 24 + 4 * 20 + outside
        assert extra_saved_bytes(plain, leaf(4, 5, 24)) >= 4 * 20 * 24 * (2 if trains else 1) + rest + 4 * 24


@pytest.mark.parametrize("name", ["layer", "layer without parameters", "rms", "rms without weight"])
def test_norms_in_8_bits_are_bounded(name: str) -> None:
    function, parameters = NORMS[name]
    weights = [p.detach() for p in parameters]
    x = leaf(4, 5, 24)
    expected, (wanted,) = gradients(lambda x: function(x, *weights), (x,))
    model = make_lean(lambda x: function(x, *weights), "8bit")
    got, (found,) = gradients(model, (x,))
    torch.testing.assert_close(got, expected)
    centred = x.detach() - (x.detach().mean(-1, keepdim=True) if "layer" in name else 0)
    rstd = (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    rows = centred * rstd
    step = rows.abs().amax(-1, keepdim=True) / 254
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)) * (weights[0] if weights else 1)
    share = (gradient * rows).mean(-1, keepdim=True).abs()
    bound = rstd * (step * share + (rows.abs() + step) * step * gradient.abs().mean(-1, keepdim=True))
    assert bool(((found - wanted).abs() <= bound * 1.001 + 1e-6).all())
    assert extra_saved_bytes(model, x) == 20 * (24 + 4 + 4) + 4 * 24 * len(weights)


@pytest.mark.parametrize("scale", [0.0, 1e-3])
def test_a_norm_whose_output_says_too_little_keeps_its_input(scale: float) -> None:
    weight = torch.ones(24)
    weight[3] = scale
    agree(lambda x, w, b: functional.layer_norm(x, (24,), w, b), leaf(6, 24), weight.requires_grad_(), leaf(24))
    agree(lambda x, w: functional.rms_norm(x, (24,), w), leaf(6, 24), weight)


def test_a_norm_whose_output_is_changed_in_place_is_still_right() -> None:
    for change in (
        functional.relu_,
        functools.partial(functional.silu, inplace=True),
        lambda y: y.mul_(2),
        lambda y: functional.dropout(y, 0.0, True, True).add_(1),
    ):
        agree(lambda x, w, change=change: change(functional.layer_norm(x, (24,), w)), leaf(6, 24), 1 + leaf(24) / 9)


class OldRms(nn.Module):
    """As Hugging Face writes it out."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + leaf(16).detach() / 9)
        self.variance_epsilon, self.offset = 1e-6, offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        weight = self.weight + self.offset if self.offset else self.weight
        return weight * wide.to(x.dtype)


LlamaRMSNorm = type("LlamaRMSNorm", (OldRms,), {})


def test_a_norm_that_is_written_out_becomes_one_node() -> None:
    plain = nn.Sequential(LlamaRMSNorm())
    model = copy.deepcopy(plain)
    LeanOperators().put_on(model)
    x = leaf(3, 5, 16)
    expected, wanted = gradients(lambda x, w: torch.func.functional_call(plain, {"0.weight": w}, (x,)), (x, leaf(16)))
    got, found = gradients(lambda x, w: torch.func.functional_call(model, {"0.weight": w}, (x,)), (x, leaf(16)))
    assert torch.equal(got, expected)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert extra_saved_bytes(model, x) == 3 * 5 * 16 * 4 + 15 * 4
    assert extra_saved_bytes(plain, x) == 2 * 3 * 5 * 16 * 4 + 15 * 4
    assert not LeanModule.fits(LlamaRMSNorm(offset=1.0))  # Gemma's formula is another


def test_old_gelus_become_one_node() -> None:
    from transformers.activations import ACT2FN

    for name, bound in (("gelu_new", 1 / 402), ("gelu_fast", 1 / 402), ("quick_gelu", 1 / 422)):
        x = leaf(4, 40)
        expected, (wanted,) = gradients(ACT2FN[name], (x,))
        for activations, tolerance, size in (("exact", 1e-5, 4), ("8bit", bound * 4, 1)):
            model = nn.Sequential(ACT2FN[name])
            LeanOperators(activations).put_on(model)
            got, (found,) = gradients(model, (x,))
            assert torch.equal(got, expected)
            assert float((found - wanted).abs().max()) <= tolerance
            assert extra_saved_bytes(model, x) == 4 * 40 * size


# Products and linears after activations


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


@pytest.mark.parametrize("activation", [functional.silu, functional.gelu])
def test_gated_products_and_linears_are_exact_and_keep_their_inputs_alone(activation: Any) -> None:
    def product(gate: Tensor, up: Tensor) -> Tensor:
        return activation(gate * 1) * (up * 1)

    def whole(gate: Tensor, up: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        return functional.linear(product(gate, up), matrix, bias)

    agree(product, leaf(3, 4, 6), leaf(3, 4, 6).detach().add(1).requires_grad_())
    agree(product, leaf(3, 4, 6), leaf(3, 1, 6))  # as in squeeze and excitation
    agree(whole, leaf(3, 4, 6), leaf(3, 4, 6), leaf(5, 6), leaf(5))
    agree(lambda x, w, b: functional.linear(activation(x), w, b), leaf(3, 4, 6), leaf(5, 6), leaf(5))
    model, plain = (Call(whole, torch.randn(5, 6), torch.randn(5)) for _ in range(2))
    LeanOperators().put_on(model)
    assert extra_saved_bytes(model, (leaf(3, 4, 6), leaf(3, 4, 6))) == 2 * 3 * 4 * 6 * 4
    assert extra_saved_bytes(plain, (leaf(3, 4, 6), leaf(3, 4, 6))) == 4 * 3 * 4 * 6 * 4


def test_an_activation_changed_in_place_is_not_taken_for_its_source() -> None:
    agree(lambda x, w: functional.linear(functional.gelu(x).add_(1), w), leaf(4, 6), leaf(5, 6))

    def function(x: Tensor) -> Tensor:
        y = x * 1
        out = functional.silu(y)
        y.add_(1)
        return out * y

    total = make_lean(function)(leaf(3)).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # as with PyTorch's own
        total.backward()


def test_gated_products_in_8_bits_are_bounded() -> None:
    gate, up = leaf(7, 40), leaf(8, 40).detach()[:7].requires_grad_()
    expected, (for_gate, for_up) = gradients(gated, (gate, up))
    got, (found_gate, found_up) = gradients(make_lean(gated, "8bit"), (gate, up))
    assert torch.equal(got, expected)
    gradient = torch.randn(7, 40, generator=torch.Generator().manual_seed(3)).abs()
    y, step = functional.silu(gate.detach()), up.detach().abs().amax(1, keepdim=True) / 254
    bound = gradient * ((up.detach().abs() + step) / 422 + step * 1.1)
    assert bool(((found_gate - for_gate).abs() <= bound + 1e-5).all())
    assert bool(((found_up - for_up).abs() <= gradient * y.abs().amax(1, keepdim=True) / 254 + 1e-5).all())
    assert extra_saved_bytes(make_lean(gated, "8bit"), (gate, up)) == 3 * 7 * 40 + 2 * 7 * 4


@pytest.mark.parametrize("before", ["gelu", "norm"])
def test_a_linear_in_8_bits_keeps_int8_rows(before: str) -> None:
    def function(x: Tensor, matrix: Tensor) -> Tensor:
        x = x * 1
        y = functional.gelu(x) if before == "gelu" else functional.layer_norm(x, (40,))
        return functional.linear(y, matrix)

    x, matrix = leaf(7, 40), leaf(5, 40)
    y = functional.gelu(x.detach()) if before == "gelu" else functional.layer_norm(x.detach(), (40,))
    _, (_, wanted) = gradients(function, (x, matrix))
    _, (_, found) = gradients(make_lean(function, "8bit"), (x, matrix))
    gradient = torch.randn(7, 5, generator=torch.Generator().manual_seed(3)).abs()
    assert bool(
        ((found - wanted).abs() <= gradient.t() @ (y.abs().amax(1, keepdim=True) / 254).expand(7, 40) + 1e-5).all()
    )
    model = Call(function, torch.randn(5, 40))
    LeanOperators("8bit").put_on(model)
    assert extra_saved_bytes(model, x) == 7 * 40 + 7 * 4 + (7 * 40 if before == "gelu" else 7 * 4)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gated": lambda x: functional.silu(x * 2) * x,
    "layer norm": lambda x: functional.layer_norm(x, (24,), torch.linspace(1, 2, 24), torch.ones(24)),
    "rms norm": lambda x: functional.rms_norm(x, (24,), torch.linspace(1, 2, 24)),
    "nothing noted": torch.sin,
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("activations", ["exact", "8bit"])
def test_columns_for_a_slice_follow_from_what_is_kept_anyhow(name: str, activations: Any) -> None:
    columns = torch.tensor([1, 2, 17])
    found: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        y = FORMS[name](x * 1)
        kind, saved = save_columns(last_activation(), y, columns)
        found.extend([y.detach()[..., columns], restore_columns(kind, saved, columns, y.dtype)])
        if activations == "exact" and name != "nothing noted":
            kept_by_node = {t.untyped_storage().data_ptr() for t in _saved_by(y)}
            assert {t.untyped_storage().data_ptr() for t in saved if t is not None} <= kept_by_node
        return y

    make_lean(function, activations)(leaf(2, 5, 24))
    expected, got = found
    peak = 2.5 * float(leaf(2, 5, 24).detach().abs().max()) ** (2 if name == "gated" else 1)
    torch.testing.assert_close(
        got.view_as(expected), expected, rtol=1e-6, atol=1e-6 if activations == "exact" else peak / 254
    )


def _saved_by(y: Tensor) -> list[Tensor]:
    node = y.grad_fn
    assert node is not None
    if hasattr(node, "saved_tensors"):
        return [t for t in node.saved_tensors if t is not None]
    return [node._saved_self]  # PyTorch's own activations
