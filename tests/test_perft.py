"""PERFT on mixtures: every form on every kind, the balance of its router, and programs."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import edgetune as et
from edgetune.adapt.perft import AdaptedExperts, imbalance
from edgetune.export import export
from support.laws import bert, fit, logits
from support.mixtures import IDS, ids, mixture

KINDS = ["Olmoe", "Mixtral", "Qwen2Moe", "Qwen3Moe", "GptOss", "DeepseekV3"]
FORMS = ["routed", "embedded", "dense", "shared"]


def adapted(model: nn.Module) -> list[AdaptedExperts]:
    return [module for module in model.modules() if isinstance(module, AdaptedExperts)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains_on_every_mixture_and_stays(kind: str, form: str) -> None:
    plain = mixture(kind)
    model = et.apply(mixture(kind), et.PERFT(form=form, rank=2, adapters=3, scale=0.5))
    torch.testing.assert_close(logits(model, ids()), logits(plain, ids()), atol=0, rtol=0)
    layers = adapted(model)
    number = {"embedded": 4, "shared": 1}.get(form, 3)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == len(layers) * (2 * number * 2 * 32 + (number * 32 if form == "routed" else 0))
    fit(model, ids())
    trained = logits(model, ids())
    assert (trained - logits(plain, ids())).abs().max() > 1e-3
    finished = et.finalize(copy.deepcopy(model))
    torch.testing.assert_close(logits(finished, ids()), trained, atol=1e-5, rtol=1e-5)
    rebuilt = et.PERFT(form=form, rank=2, adapters=3).rebuild(mixture(kind), finished.state_dict())
    rebuilt.load_state_dict(finished.state_dict())
    torch.testing.assert_close(logits(rebuilt, ids()), logits(finished, ids()), atol=0, rtol=0)


@pytest.mark.parametrize(("form", "active"), [("routed", 2), ("embedded", 2), ("dense", 4), ("shared", 1)])
def test_a_token_gets_the_adapters_of_its_form(form: str, active: int) -> None:
    torch.manual_seed(0)
    layer = adapted(et.apply(mixture(), et.PERFT(form=form, rank=2, activation="silu")))[0]
    nn.init.normal_(layer.up.weight)
    x = torch.randn(5, 32)
    index, weights = torch.tensor([[0, 2]]).expand(5, 2), torch.tensor([[0.75, 0.25]]).expand(5, 2)
    added = layer(x, index, weights) - layer.base(x, index, weights)
    downs, ups = layer.down.weight.view(layer.number, 2, 32), layer.up.weight.view(32, layer.number, 2)
    each = torch.stack([functional.silu(x @ downs[n].T) @ ups[:, n].T for n in range(layer.number)], 1)
    shares = torch.ones(5, layer.number)
    if form == "embedded":
        shares = torch.tensor([[0.75, 0, 0.25, 0]]).expand(5, 4)
    elif form == "routed":
        probabilities = layer.router(x).softmax(-1)
        shares = probabilities * (probabilities >= probabilities.topk(2, -1).values[:, -1:])
    assert ((shares > 0).sum(-1) == active).all()
    torch.testing.assert_close(added, (each * shares.unsqueeze(-1)).sum(1), atol=1e-4, rtol=1e-4)


def test_the_penalty_evens_out_the_router() -> None:
    chosen = torch.tensor([[0, 1], [2, 3]])
    assert imbalance(torch.full((2, 4), 0.25), chosen) == 1
    assert imbalance(torch.eye(4)[[0, 0]], torch.tensor([[0], [0]])) == 4
    technique = et.PERFT(rank=2, balance=0.5)
    model = et.apply(mixture(), technique)
    assert et.penalty(model) is None
    model(IDS)
    assert et.penalty(model) is None  # in evaluation mode
    model.train()
    for layer in adapted(model):
        with torch.no_grad():
            layer.router.weight.zero_()[0] = 1.0
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        model(IDS)
        added = et.penalty(model)
        assert added is not None
        added.backward()
        optimizer.step()
        values.append(added.item())
    assert values[-1] < values[0]
    assert et.penalty(model) is None  # of each forward once
    silent = et.apply(mixture(), et.PERFT(form="dense")).train()
    silent(IDS)
    assert et.penalty(silent) is None


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe"])
def test_a_program_of_each_mixture_agrees(kind: str, tmp_path: Path) -> None:
    form = {"Mixtral": "routed", "Qwen2Moe": "embedded", "Qwen3Moe": "dense", "Olmoe": "shared"}[kind]
    model = et.apply(mixture(kind), et.PERFT(form=form, rank=2))
    fit(model, ids())
    example = {"input_ids": IDS[:1]}
    expected = logits(model, example)
    artifact = export(et.finalize(model), example, tmp_path / "model.pte", check_inputs=[example])
    assert artifact.manifest.main.parity.max_relative_difference < 1e-5
    torch.testing.assert_close(artifact.run(example)[0], expected, atol=1e-4, rtol=1e-4)


def test_adapters_stay_when_the_experts_are_quantized() -> None:
    model = et.apply(mixture(), et.PERFT(rank=2))
    fit(model, ids())
    finished = et.finalize(model)
    expected = logits(finished, ids())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gate.weight: these weights do not belong")  # the router
        quantized = et.apply(finished, et.Int8Dynamic())
    assert len(adapted(quantized)) == 2
    assert (logits(quantized, ids()) - expected).norm() < 0.05 * expected.norm()


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(et.EdgetuneError, match="no fused experts"):
        et.apply(bert(), et.PERFT())
    with pytest.raises(et.EdgetuneError, match="cannot get 3 of 2 adapters"):
        et.PERFT(adapters=2, top=3)
    model = et.finalize(et.apply(mixture(), et.PERFT(rank=2)))
    with pytest.raises(et.EdgetuneError, match="has adapters of perft already"):
        et.apply(model, et.PERFT())
    model = et.apply(mixture(), et.PERFT(rank=2, targets=("model.layers.1.*",)))
    assert len(adapted(model)) == 1
