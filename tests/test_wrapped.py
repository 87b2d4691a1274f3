from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.adapt.lora import LoRA
from edgetune.core.carriers import is_wrapped, plain_layer, plain_tensors
from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import replace
from edgetune.core.merging import merge, merge_layer
from edgetune.core.wrapped import Wrapped
from support.laws import dense, llama, logits, mlp, vectors


class Scaled(Wrapped):
    """A linear whose rows are scaled: the smallest technique there could be."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.scale = nn.Parameter(torch.rand(dense(base).shape[0]) + 0.5)

    def plain_tensors(self) -> dict[str, Tensor]:
        tensors = plain_tensors(self.base)
        return {**tensors, "weight": self.scale[:, None] * tensors["weight"]}

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, **self.plain_tensors())


class Shifted(Wrapped):
    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.low = nn.Linear(dense(base).shape[1], 1, bias=False)

    def plain_tensors(self) -> dict[str, Tensor]:
        tensors = plain_tensors(self.base)
        return {**tensors, "weight": tensors["weight"] + self.low.weight}

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.low(x)


def wrapped_mlp() -> nn.Module:
    model = mlp()
    replace(model, "stem", Scaled(model.stem))
    replace(model, "blocks.0.up", Shifted(Scaled(model.get_submodule("blocks.0.up"))))
    return model.eval()


def test_nested_wrappers_compute_with_their_dense_weight() -> None:
    layer = wrapped_mlp().get_submodule("blocks.0.up")
    x = torch.randn(4, 32)
    torch.testing.assert_close(layer(x), functional.linear(x, dense(layer), plain_layer(layer).bias))


def test_keys_are_the_plain_ones_at_every_depth_and_load_both_ways() -> None:
    plain, model = mlp(), wrapped_mlp()
    extra = {"stem.scale", "blocks.0.up.scale", "blocks.0.up.low.weight"}
    assert set(model.state_dict()) == set(plain.state_dict()) | extra
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1.0)
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(result.missing_keys) == {"stem.scale", "blocks.0.up.base.scale", "blocks.0.up.low.weight"}
    assert not result.unexpected_keys
    assert torch.equal(
        plain_layer(model.get_submodule("blocks.0.up")).weight, plain.get_submodule("blocks.0.up").weight
    )
    other = wrapped_mlp()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(other, vectors()), logits(model, vectors()), atol=0, rtol=0)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k not in extra})


def test_merge_leaves_plain_layers_with_the_same_outputs_and_trainability() -> None:
    model = wrapped_mlp()
    plain_layer(model.stem).weight.requires_grad_(False)
    expected, stem = logits(model, vectors()), plain_layer(model.stem)
    assert merge(model) is model
    torch.testing.assert_close(logits(model, vectors()), expected)
    assert model.stem is stem
    assert not stem.weight.requires_grad
    assert stem.bias.requires_grad
    assert set(model.state_dict()) == set(mlp().state_dict())
    assert not any(is_wrapped(module) for module in model.modules())


def test_merge_of_a_chosen_kind_leaves_the_rest() -> None:
    model = wrapped_mlp()
    expected = logits(model, vectors())
    merge(model, lambda module: isinstance(module, Shifted))
    assert isinstance(model.stem, Scaled)
    assert type(model.get_submodule("blocks.0.up")) is nn.Linear  # with what it wraps
    torch.testing.assert_close(logits(model, vectors()), expected)


def test_a_layer_under_two_names_is_merged_once() -> None:
    model = mlp()
    shared = Scaled(nn.Linear(32, 32))
    model.blocks[0].norm, model.blocks[1].norm = shared, shared
    expected = logits(model, vectors())
    merge(model)
    assert model.blocks[0].norm is model.blocks[1].norm is shared.base
    torch.testing.assert_close(logits(model, vectors()), expected)


def test_a_tied_weight_is_not_merged() -> None:
    model = llama(tied=True)
    before = model.lm_head.weight.detach().clone()
    model.lm_head = Scaled(model.lm_head)
    with pytest.raises(EdgetuneError, match="shares its weight"):
        merge(model)
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_a_wrapper_itself_merges_and_copies() -> None:
    layer = Shifted(Scaled(nn.Linear(4, 3)))
    x = torch.randn(2, 4)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert set(other.state_dict()) == {"weight", "bias", "scale", "low.weight"}
        torch.testing.assert_close(merge(other)(x), layer(x))


def test_a_name_wanted_twice_raises() -> None:
    layer = Scaled(nn.Linear(4, 3))
    layer.register_buffer("weight", torch.zeros(1))
    with pytest.raises(EdgetuneError, match="names a tensor as its base does"):
        layer.state_dict()


def test_dense_follows_what_peft_computes_with() -> None:
    model = LoRA(rank=2, targets=("stem",)).apply(mlp())
    with torch.no_grad():
        model.stem.lora_B["default"].weight.fill_(0.3)
    x, layer, base = torch.randn(3, 32), model.stem, model.stem.base_layer.weight.detach().clone()
    expected = dense(layer).detach().clone()
    assert not torch.equal(expected, base)
    layer.enable_adapters(False)
    assert torch.equal(dense(layer), base)
    layer.enable_adapters(True)
    layer.merge()  # by peft itself: the sum is in the base now and must not be added again
    torch.testing.assert_close(dense(layer), expected)
    torch.testing.assert_close(functional.linear(x, dense(layer), layer.base_layer.bias), layer(x))
    torch.testing.assert_close(merge_layer(layer).weight.detach(), expected)


def test_what_has_no_weight_raises() -> None:
    with pytest.raises(EdgetuneError, match="has no weight"):
        dense(nn.ReLU())
