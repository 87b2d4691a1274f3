from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional

import edgetune as et
from edgetune.adapt.glora_search import count, within
from edgetune.adapt.supports import FORMS, GLoRALinear, SupportPath, draw_path
from edgetune.core.errors import EdgetuneError
from edgetune.core.technique import Sample
from support.laws import bert, fit, logits, loss_of, mlp, tokens, vectors

torch.set_num_threads(1)


def randomized(layer: GLoRALinear) -> GLoRALinear:
    with torch.no_grad():
        for name, parameter in layer.named_parameters(recurse=False):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_any_path_is_the_identity_at_first_and_merges_weight_and_bias(bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 12)
    for _ in range(40):
        plain, path = nn.Linear(12, 20, bias=bias), draw_path(4)
        layer = GLoRALinear(plain, path, supernet=False)
        assert torch.equal(layer(x), plain(x))
        randomized(layer)
        expected = layer(x)
        merged = et.finalize(nn.Sequential(layer))[0]
        assert type(merged) is nn.Linear
        assert (merged.bias is not None) == (bias or path.C != "none" or path.E != "none")
        torch.testing.assert_close(merged(x), expected, atol=1e-5, rtol=1e-5)


def test_it_computes_the_equation_of_the_paper() -> None:
    plain, x = nn.Linear(6, 8), torch.randn(3, 6)
    layer = randomized(GLoRALinear(plain, SupportPath(rank=2), supernet=False))
    w, b, own = plain.weight, plain.bias, dict(layer.named_parameters())
    a, add, c = (own[f"{name}_down"] @ own[f"{name}_up"] for name in "ABC")
    expected = functional.linear(x, w + w * a + add, (w @ c).squeeze(1) + own["D"] * b + own["E"] + b)
    torch.testing.assert_close(layer(x), expected)


def test_smaller_supports_are_slices_of_the_largest() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6)
    layer = randomized(GLoRALinear(nn.Linear(6, 8), SupportPath(rank=4), supernet=True)).eval()
    for _ in range(20):
        path = draw_path(4)
        layer.path = path
        expected = layer(x)
        settled = GLoRALinear(layer.base, SupportPath(rank=4), supernet=True).eval()
        settled.load_state_dict(layer.state_dict())
        settled.settle(path)
        torch.testing.assert_close(settled(x), expected)
        sizes = {name: tuple(parameter.shape) for name, parameter in settled.named_parameters(recurse=False)}
        assert sizes == path.sizes(8, 6)


def test_a_supernet_takes_another_path_each_step_once_it_trained() -> None:
    model = et.apply(mlp(), et.GLoRA(rank=4, targets=["stem"])).train()
    layer = model.get_submodule("stem")
    loss_of(model(vectors())).backward()
    assert all(parameter.grad is not None for parameter in layer.parameters(recurse=False))  # the first takes all
    fit(model, vectors(), steps=1)
    model.train()
    outputs = {tuple(model(vectors()).flatten().tolist()) for _ in range(8)}
    assert len(outputs) > 4
    torch.manual_seed(5)
    drawn = model(vectors())
    torch.manual_seed(5)
    assert torch.equal(model(vectors()), drawn)
    model.eval()
    assert torch.equal(model(vectors()), model(vectors()))


def labelled(number: int = 4) -> Sample:
    x = torch.randn(64 * number, 32, generator=torch.Generator().manual_seed(1))
    y = x[:, :3].argmax(1)
    batches = [(x[n : n + 64], y[n : n + 64]) for n in range(0, len(x), 64)]
    return Sample(x[:2], lambda: (a for a, _ in batches), lambda: iter(batches), functional.cross_entropy)


def train(model: nn.Module, steps: int) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batches = list(labelled().labels()[0]())
    model.train()
    for step in range(steps):
        x, y = batches[step % len(batches)]
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def loss_on(model: nn.Module) -> float:
    batches, loss = labelled().labels()
    values = [float(loss(model(x), y)) for x, y in batches()]
    return sum(values) / len(values)


def test_a_search_settles_on_paths_within_the_limit_that_train_on_and_merge(tmp_path: Path) -> None:
    model = et.apply(mlp(), et.GLoRA(rank=4, targets=["blocks.*.up", "blocks.*.down"]), labelled())
    train(model, 60)
    search = et.GLoRASearch(max_parameters=900, population=8, parents=4, generations=3)
    model = et.apply(model, search, labelled())
    layers = {name: m for name, m in model.named_modules() if isinstance(m, GLoRALinear)}
    assert 0 < sum(p.numel() for p in model.parameters() if p.requires_grad) <= 900
    assert not any(layer.supernet for layer in layers.values())
    before = loss_on(model)
    assert f"loss of {before:.4g}" in search.note(model)
    search.save(model, tmp_path)
    again = et.GLoRA(**yaml.safe_load((tmp_path / "paths.yaml").read_text(encoding="utf-8")))
    assert {n: m.path for n, m in et.apply(mlp(), again).named_modules() if isinstance(m, GLoRALinear)} == {
        name: layer.path for name, layer in layers.items()
    }
    train(model, 40)
    trained = logits(model, vectors())
    assert loss_on(model) < before
    model = et.finalize(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in mlp().modules()]
    torch.testing.assert_close(logits(model, vectors()), trained, atol=1e-5, rtol=1e-4)


def test_a_choice_is_cut_no_further_than_the_limit_asks() -> None:
    torch.manual_seed(0)
    layers = [GLoRALinear(nn.Linear(12, 20), SupportPath(rank=4), supernet=True) for _ in range(6)]
    for most in (20, 80, 240):
        paths = tuple(draw_path(4) for _ in layers)
        kept = within(layers, paths, most, random.Random(most))
        sizes = [count(layer, path) for layer, path in zip(layers, kept, strict=True)]
        assert sum(sizes) <= most < sum(count(layer, path) for layer, path in zip(layers, paths, strict=True))
        for number, (path, drawn) in enumerate(zip(kept, paths, strict=True)):
            for key in (key for key in FORMS if getattr(path, key) != getattr(drawn, key)):
                larger = path.model_copy(update={key: getattr(drawn, key)})
                assert sum(sizes) - sizes[number] + count(layers[number], larger) > most, "it would fit"


def test_the_search_finds_no_worse_than_chance_and_is_reproducible() -> None:
    model = et.apply(mlp(), et.GLoRA(rank=2, targets=["blocks.*.up"]), labelled())
    train(model, 40)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    chosen = []
    for generations in (0, 4, 4):
        other = et.apply(mlp(), et.GLoRA(rank=2, targets=["blocks.*.up"]), labelled())
        other.load_state_dict(state)
        torch.manual_seed(3)
        other = et.apply(other, et.GLoRASearch(max_parameters=300, population=6, generations=generations), labelled())
        first = next(m for m in other.modules() if isinstance(m, GLoRALinear))
        chosen.append((first.searched_loss, [m.path for m in other.modules() if isinstance(m, GLoRALinear)]))
    assert chosen[1] == chosen[2]
    assert chosen[1][0] <= chosen[0][0]


def test_a_limit_of_one_value_leaves_one() -> None:
    model = et.apply(mlp(), et.GLoRA(targets=["stem", "classifier"]), labelled())
    model = et.apply(model, et.GLoRASearch(max_parameters=1, population=2, generations=1), labelled())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(EdgetuneError, match="no supernet to search"):
        et.apply(mlp(), et.GLoRASearch(max_parameters=9), labelled())
    with pytest.raises(EdgetuneError, match="batches with labels and a loss are needed"):
        et.apply(mlp(), et.GLoRASearch(max_parameters=9), Sample.of(vectors()))
    with pytest.raises(EdgetuneError, match=r"paths: these targets have none.*stem"):
        et.apply(mlp(), et.GLoRA(targets=["stem", "classifier"], paths={"classifier": {}}))
    with pytest.raises(EdgetuneError, match="paths: the pattern matches no target"):
        et.apply(mlp(), et.GLoRA(targets=["stem"], paths={"*": {}, "*.up": {}}))
    with pytest.raises(EdgetuneError, match="no path given"):
        et.GLoRA(targets=["stem"], paths={})
    assert {"low-rank", "vector", "scalar", "none"} == set(FORMS["A"])


def test_a_bias_appears_where_there_was_none_and_the_model_exports(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(32, 16, bias=False), nn.ReLU(), nn.Linear(16, 3)).eval()
    model = et.apply(model, et.GLoRA(targets=["0"]))
    fit(model, vectors())
    trained = logits(model, vectors())
    model = et.finalize(model)
    assert model[0].bias is not None
    torch.testing.assert_close(logits(model, vectors()), trained, atol=1e-5, rtol=1e-4)
    artifact = et.export(model, vectors(), tmp_path / "m.pte", target="xnnpack")
    assert artifact.manifest.main.parity.max_abs_difference < 1e-5


def test_bert_in_16_bits_keeps_its_type() -> None:
    model = et.apply(bert().bfloat16(), et.GLoRA(targets=["*.query"]))
    assert model.get_parameter("bert.encoder.layer.0.attention.self.query.E").dtype == torch.float32
    assert logits(model, tokens()).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in et.finalize(model).parameters()} == {torch.bfloat16}


def test_rounding_aware_training_sees_the_moved_bias() -> None:
    model = et.apply(mlp(), [et.GLoRA(targets=["stem"], paths={"*": {}}), et.QAT(targets=["stem"], embeddings="none")])
    with torch.no_grad():
        model.get_parameter("stem.base.E").fill_(3.0)
    layer, x = model.get_submodule("stem"), torch.randn(4, 32)
    expected = mlp().get_submodule("stem")(x) + 3
    assert ((layer(x) - expected).norm() / expected.norm()).item() < 0.1
    assert ((et.finalize(model).get_submodule("stem")(x) - expected).norm() / expected.norm()).item() < 0.1
