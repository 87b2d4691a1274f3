"""Rotations of the residual stream and of heads: exact on language models with RMS norms, refused elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgetune as et
from edgetune.core.errors import EdgetuneError
from edgetune.core.probe import relative_difference
from edgetune.quant.hadamard import hadamard_matrix, random_rotation
from edgetune.quant.size import weight_bits
from support.causal import family
from support.laws import bert, llama, logits, mlp, tokens, vectors


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 28, 36, 40, 64, 576])
def test_a_hadamard_matrix_has_orthogonal_rows_of_ones(size: int) -> None:
    matrix = hadamard_matrix(size)
    assert matrix is not None
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.t(), size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [6, 52, 64])
def test_a_random_rotation_is_orthogonal_and_follows_its_seed(size: int) -> None:
    matrix = random_rotation(size, 3)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64))
    assert torch.equal(matrix, random_rotation(size, 3))
    assert not torch.equal(matrix, random_rotation(size, 4))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"tie_word_embeddings": True, "attn_implementation": "eager"}),
        ("Qwen2", {}),
        ("Qwen3", {}),
        ("Mistral", {}),
        ("Phi3", {}),
        ("Gemma", {}),
        ("Gemma", {"tie_word_embeddings": False}),
    ],
)
def test_a_rotated_language_model_computes_the_same(name: str, settings: dict[str, object]) -> None:
    model = family(name, **settings)
    plain = copy.deepcopy(model)
    rotated = et.apply(model, et.Rotate(), et.Sample.of(tokens()))
    other = {"input_ids": torch.tensor([[5, 9, 2, 40, 7, 1]])}
    for inputs in (tokens(), other):
        torch.testing.assert_close(logits(rotated, inputs), logits(plain, inputs), atol=2e-5, rtol=1e-4)
    for key in ("embed_tokens", "layers.0.self_attn.o_proj", "layers.1.mlp.down_proj"):
        weights = [each.get_parameter(f"model.{key}.weight") for each in (rotated, plain)]
        assert not torch.allclose(*weights)


def test_heads_can_be_left_as_they_are() -> None:
    plain: Any = llama()
    rotated: Any = et.apply(llama(), et.Rotate(heads=False), et.Sample.of(tokens()))
    rotation = random_rotation(32, 0).float()
    torch.testing.assert_close(
        rotated.model.layers[0].self_attn.v_proj.weight, plain.model.layers[0].self_attn.v_proj.weight @ rotation
    )
    torch.testing.assert_close(
        rotated.model.layers[0].self_attn.o_proj.weight, rotation.t() @ plain.model.layers[0].self_attn.o_proj.weight
    )
    assert torch.equal(rotated.model.norm.weight, torch.ones(32))


def tied() -> Any:
    return family("Llama", tie_word_embeddings=True)


def test_a_tied_head_stays_tied_and_a_linear_takes_the_weight_of_its_norm() -> None:
    plain, model = tied(), et.apply(tied(), et.Rotate(tied="keep"), et.Sample.of(tokens()))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    assert model.state_dict().keys() - plain.state_dict().keys() == {"model.norm.gain.weight"}
    gains, rotation = plain.model.norm.weight.double(), random_rotation(32, 0)
    both = torch.eye(32) + model.model.norm.gain.weight.double()
    expected = rotation.t() @ gains.diag() @ rotation
    torch.testing.assert_close(model.model.norm.weight.double() * both, expected, check_dtype=False)


def test_equal_gains_need_no_linear() -> None:
    model: Any = et.apply(llama(tied=True), et.Rotate(tied="keep"), et.Sample.of(tokens()))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.state_dict().keys() == llama(tied=True).state_dict().keys()


def test_a_tied_head_is_untied_by_default() -> None:
    model: Any = et.apply(tied(), et.Rotate(), et.Sample.of(tokens()))
    torch.testing.assert_close(logits(model, tokens()), logits(tied(), tokens()), atol=2e-5, rtol=1e-4)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    assert model.state_dict().keys() == tied().state_dict().keys()


def test_the_linear_of_the_norm_is_rounded_as_any_other() -> None:
    rotated: Any = et.apply(tied(), et.Rotate(tied="keep"), et.Sample.of(tokens()))
    exact = logits(rotated, tokens())
    step = et.Int8Dynamic(targets=("*.gain", "lm_head"))
    rounded = et.apply(rotated, step, et.Sample.of(tokens()))
    assert weight_bits(rounded.get_parameter("model.norm.gain.weight")) == 8
    assert 0 < relative_difference(exact, logits(rounded, tokens())) < 0.03


def test_large_channels_no_longer_spoil_quantization() -> None:
    def outliers() -> nn.Module:
        model: Any = family("Llama")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.input_layernorm.weight[[3, 17]] *= 30
                layer.post_attention_layernorm.weight[[3, 17]] *= 30
        return model  # type: ignore[no-any-return]

    exact, sample = logits(outliers(), tokens()), et.Sample.of(tokens())

    def error(*steps: et.Technique) -> float:
        return float((logits(et.apply(outliers(), steps, sample), tokens()) - exact).norm() / exact.norm())

    step = et.Int8Dynamic(targets=("*.gate_proj", "*.up_proj"), embeddings="none")
    assert error(et.Rotate(), step) < 0.9 * error(step)


def hidden_states() -> nn.Module:
    model: Any = llama()
    return model.model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("build", "inputs", "message"),
    [
        (bert, tokens, "BertForSequenceClassification cannot be rotated: its LayerNorm subtracts the mean"),
        (mlp, vectors, "Mlp cannot be rotated: it looks up no embeddings"),
        (hidden_states, tokens, "LlamaModel cannot be rotated: it returns its hidden states"),
        (lambda: family("Olmo2"), tokens, "Olmo2ForCausalLM cannot be rotated: a rotation does not pass the operator"),
    ],
)
def test_other_models_are_refused_and_stay(build: Callable[[], nn.Module], inputs: Any, message: str) -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(EdgetuneError, match=f"rotate: {message}"):
        et.apply(model, et.Rotate(), et.Sample.of(inputs()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_not_finite_is_refused() -> None:
    model: Any = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(EdgetuneError, match=r"rotate, model.layers.1.mlp.up_proj: a weight is NaN or infinite"):
        et.apply(model, et.Rotate(), et.Sample.of(tokens()))


def test_outputs_that_change_bring_the_weights_and_the_tie_back() -> None:
    class Unrecorded(type(llama())):  # type: ignore[misc]
        """Reads the embedding table in all forwards but the first, which is recorded."""

        calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            output = super().forward(*args, **kwargs)
            if self.calls > 1:
                output.logits = output.logits + self.model.embed_tokens.weight.sum()
            return output

    model = tied()
    model.__class__ = Unrecorded
    before: dict[str, Tensor] = copy.deepcopy(model.state_dict())
    with pytest.raises(EdgetuneError, match="outputs of Unrecorded on the sample change by"):
        et.apply(model, et.Rotate(tied="keep"), et.Sample.of(tokens()))
    assert model.state_dict().keys() == before.keys()
    assert not model.model.norm._forward_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
