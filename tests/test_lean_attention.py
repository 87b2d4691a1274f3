from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.lean import attention
from edgetune.lean.operators import LeanOperators
from support.lean_models import Call, agree, extra_saved_bytes, gradients, leaf, make_lean

torch.set_num_threads(1)


# Attention

MASKS: dict[str, Tensor | None] = {
    "none": None,
    "padding": (torch.arange(9) < torch.tensor([[9], [5]]))[:, None, None].expand(2, 1, 7, 9),
    "heads": torch.rand(2, 4, 7, 9, generator=torch.Generator().manual_seed(1)) < 0.7,
    "flat": torch.ones(7, 9, dtype=torch.bool).tril(2),
    "floats": torch.randn(2, 1, 7, 9, generator=torch.Generator().manual_seed(1)),
    "a query that may look nowhere": torch.arange(7)[:, None].ne(3).expand(2, 1, 7, 9),
}


def heads(batch: int, number: int, length: int, width: int, seed: int) -> Tensor:
    """As models make them: a view of `(batch, length, heads, width)`."""
    x = torch.randn(batch, length, number, width, generator=torch.Generator().manual_seed(seed))
    return x.transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("chunk", [20, 200, 2**17])
def test_attention_is_exact(monkeypatch: pytest.MonkeyPatch, name: str, groups: int, chunk: int) -> None:
    monkeypatch.setattr(attention, "_CHUNK", chunk)
    inputs = (heads(2, 4, 7, 8, 1), heads(2, 4 // groups, 9, 8, 2), heads(2, 4 // groups, 9, 8, 3))
    for short in (2**16, 0):  # ours, and the flash kernel
        monkeypatch.setattr(attention, "_SHORT", short)
        for scale in (None, 0.7):
            attend = functools.partial(functional.scaled_dot_product_attention, attn_mask=MASKS[name], scale=scale)
            agree(functools.partial(attend, enable_gqa=groups > 1), *inputs)


@pytest.mark.parametrize("short", [2**16, 0])
def test_causal_attention_is_exact_in_any_precision(monkeypatch: pytest.MonkeyPatch, short: int) -> None:
    monkeypatch.setattr(attention, "_SHORT", short)
    attend = functools.partial(functional.scaled_dot_product_attention, is_causal=True)
    inputs = tuple(heads(2, 3, 6, 4, i) for i in range(3))
    agree(attend, *inputs)
    agree(attend, inputs[0], *(x.detach() for x in inputs[1:]))
    agree(attend, *(x.detach().double().requires_grad_() for x in inputs))
    agree(attend, *(x.detach().bfloat16().requires_grad_() for x in inputs), tolerance=2e-2)


@pytest.mark.parametrize("name", MASKS)
def test_attention_with_dropout_has_the_gradient_of_its_own_mask(name: str) -> None:
    """Against finite differences: a make_generator call drops the same scores each time."""

    def seeded_call(*inputs: Tensor) -> Tensor:
        torch.manual_seed(0)
        return model(*inputs)

    attend = functools.partial(functional.scaled_dot_product_attention, attn_mask=MASKS[name], dropout_p=0.4)
    model = make_lean(functools.partial(attend, enable_gqa=True))
    inputs = (heads(2, 4, 7, 3, 1), heads(2, 2, 9, 3, 2), heads(2, 2, 9, 3, 3))
    doubles = tuple(x.detach().double().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(seeded_call, doubles, fast_mode=True)
    assert not torch.equal(model(*inputs), model(*inputs))


def test_dropout_in_attention_keeps_the_mean() -> None:
    inputs = tuple(heads(1, 2, 5, 4, i) for i in range(3))
    model = make_lean(functools.partial(functional.scaled_dot_product_attention, dropout_p=0.2))
    mean = torch.stack([model(*inputs).detach() for _ in range(2000)]).mean(0)
    assert float((mean - functional.scaled_dot_product_attention(*inputs)).detach().abs().max()) < 0.1


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_attention_keeps_its_inputs_and_no_scores(p: float) -> None:
    inputs = tuple(heads(2, 4, 16, 8, i).detach().requires_grad_() for i in range(3))
    mask = MASKS["padding"]
    assert mask is not None
    mask = (torch.arange(16) < torch.tensor([[16], [5]]))[:, None, None].expand(2, 1, 16, 16)
    attend = functools.partial(functional.scaled_dot_product_attention, attn_mask=mask, dropout_p=p)
    one = 2 * 4 * 16 * 8 * 4
    assert extra_saved_bytes(make_lean(attend), inputs) == 3 * one + 2 * 16  # the mask before it was expanded
    assert extra_saved_bytes(Call(attend), inputs) >= 4 * one + 4 * 2 * 16 * 16


def test_repeated_keys_and_values_are_kept_once() -> None:
    def function(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        few = [x * 1 for x in (key, value)]
        many = [x[:, :, None].expand(2, 2, 3, 9, 8).reshape(2, 6, 9, 8) for x in few]
        return functional.scaled_dot_product_attention(query, *many, attn_mask=mask)

    mask = MASKS["padding"]
    assert mask is not None
    inputs = (heads(2, 6, 7, 8, 1), heads(2, 2, 9, 8, 2), heads(2, 2, 9, 8, 3))
    agree(functools.partial(function, mask=mask), *inputs)
    size = 4 * 2 * 8 * (6 * 7 + 2 * 2 * 9)
    assert extra_saved_bytes(make_lean(functools.partial(function, mask=mask)), inputs) == size + 2 * 9


def test_multi_head_attention_of_torch() -> None:
    plain = nn.MultiheadAttention(16, 4, batch_first=True)
    model = copy.deepcopy(plain)
    LeanOperators("8bit").put_on(model)
    x = leaf(2, 5, 16)
    for weights in (True, False):
        expected, (wanted,) = gradients(lambda x, w=weights: plain(x, x, x, need_weights=w)[0], (x,))
        got, (found,) = gradients(lambda x, w=weights: model(x, x, x, need_weights=w)[0], (x,))
        torch.testing.assert_close(got, expected)
        assert float((found - wanted).norm()) <= (0.05 if weights else 1e-5) * float(wanted.norm())


# Loss


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [0, 1, 6, 8])
def test_cross_entropy_is_exact(reduction: str, ignored: int) -> None:
    labels = torch.arange(8) % 5
    labels[:ignored] = -100
    loss = functools.partial(functional.cross_entropy, target=labels, reduction=reduction)
    if ignored < 8 or reduction != "mean":
        agree(loss, leaf(8, 5))
        agree(loss, leaf(8, 5, dtype=torch.bfloat16), tolerance=1e-2)
    agree(functools.partial(functional.cross_entropy, target=labels % 5, label_smoothing=0.1), leaf(8, 5))
    rows = 8 - ignored
    size = rows * (5 * 4 + 8) + 8 if rows <= 6 else 8 * (5 * 4 + 8) + 8
    assert extra_saved_bytes(make_lean(loss), leaf(8, 5)) == size
