from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.inputs import Inputs
from edgetune.sparse.auto import contribution
from edgetune.sparse.auto.contribution import (
    Analysis,
    Contributions,
    analyze_contributions,
    candidates,
    each_gradient,
    weight_scores,
)
from edgetune.sparse.scheme import Slice
from support.laws import cnn, llama, mlp
from support.schemes import loss, rows

torch.set_num_threads(1)

MIB = 2**20


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


# Fisher information


def test_fisher_is_the_root_of_squared_gradients_by_channel() -> None:
    model, batches = mlp(), rows(16, 0)
    found = analyze_contributions(model, batches, loss, Analysis(rows_at_once=8), head=["classifier"])
    squares: dict[str, Tensor] = {}
    for inputs, labels in batches:
        model.zero_grad()
        loss(model(inputs), labels).backward()
        for name, parameter in model.named_parameters():
            squares[name] = squares.get(name, torch.zeros(())) + parameter.grad.square() / len(batches)  # type: ignore[union-attr]
    weight, bias = squares["blocks.2.up.weight"], squares["blocks.2.up.bias"].sqrt().sum()
    by_input = (weight.sum(0) * weight.shape[0]).sqrt()
    by_output = (weight.sum(1) * weight.shape[1]).sqrt()
    own = found.values["blocks.2.up"]
    assert own["bias"] == pytest.approx(bias.item(), rel=1e-4)
    assert own["full"] == pytest.approx((bias + min(by_input.sum(), by_output.sum())).item(), rel=1e-4)
    best = weight.sum(0).topk(8).indices
    assert own[Slice(ratio=0.25, by="fisher")] == pytest.approx((bias + by_input[best].sum()).item(), rel=1e-4)
    assert found.values["blocks.2.norm"]["full"] > found.values["blocks.2.norm"]["bias"] > 0
    assert "classifier" not in found.values


def test_more_of_a_layer_is_worth_more() -> None:
    for mode in ("magnitude", "fisher"):
        found = analyze_contributions(cnn(), _pictures(), loss, Analysis(by=mode), cache=False)  # type: ignore[arg-type]
        for own in found.values.values():
            assert list(own.values()) == sorted(own.values())
        ratios = [p.ratio for p in found.values["blocks.1.pointwise"] if isinstance(p, Slice)]
        assert ratios == [0.125, 0.25, 0.5]


def _pictures() -> list[tuple[Inputs, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(4, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2, 0]))]


def test_gradients_are_given_one_at_a_time_and_dropped() -> None:
    model, batches = mlp(), rows(16, 1)
    model.stem.weight.requires_grad_(False)
    seen: list[tuple[str, str]] = []

    def use(name: str, key: str, gradient: Tensor) -> None:
        seen.append((name, key))
        assert sum(p.grad is not None for p in model.parameters()) == 1

    layers = {name: model.get_submodule(name) for name in ("stem", "blocks.1.down")}
    assert each_gradient(model, layers, batches, loss, 4, use) == 4
    assert len(seen) == 4 * 4
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["stem.weight"]


def test_weight_scores_are_those_of_the_mean_gradient_and_of_the_mean_square() -> None:
    model, batches = mlp(), rows(16, 2)
    gradients = []
    for inputs, labels in batches:
        model.zero_grad()
        loss(model(inputs), labels).backward()
        gradients.append(model.blocks[0].up.weight.grad.clone())
    stacked = torch.stack(gradients)
    for by, expected in (("gradient", stacked.mean(0).abs()), ("fisher", stacked.square().mean(0))):
        scores = weight_scores(mlp(), ["blocks.0.up"], batches, loss, by, rows_at_once=8)["blocks.0.up"]  # type: ignore[arg-type]
        assert torch.allclose(scores, expected, rtol=1e-4, atol=1e-9)


def test_no_batch_is_refused() -> None:
    with pytest.raises(EdgetuneError, match="batches with labels") as error:
        analyze_contributions(mlp(), [], loss)
    assert error.value.exit_code == Exit.DATA


def test_layers_that_share_a_weight_are_no_candidates() -> None:
    names = candidates(llama(tied=True), ["model.norm"])
    assert "lm_head" not in names
    assert "model.embed_tokens" not in names
    assert "model.norm" not in names
    assert "model.layers.1.mlp.up_proj" in names


# The cache


def test_the_result_is_kept_by_weights_data_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = mlp(), rows(16, 6)
    first = analyze_contributions(model, batches, loss)
    again = analyze_contributions(model, batches, loss)
    assert not first.cached
    assert again.cached
    assert again.values == first.values
    assert not analyze_contributions(model, batches, loss, Analysis(ratios=(0.5,))).cached
    assert not analyze_contributions(model, rows(16, 7), loss).cached
    with torch.no_grad():
        model.stem.bias[0] += 1
    assert not analyze_contributions(model, batches, loss).cached
    monkeypatch.setattr(contribution, "score_by_fisher", lambda *_: pytest.fail("was to be read from the cache"))
    assert analyze_contributions(model, batches, loss).cached


def test_contributions_print() -> None:
    values: dict[str, dict[Any, float]] = {"a": {"bias": 0.5, "full": 2.0}, "b": {Slice(ratio=0.25, by="fisher"): 3.0}}
    found = Contributions(values)
    assert str(found) == (
        "contributions by fisher, of 2 layers the best:\n"
        "  b: 1/4 by fisher 3\n"
        "  a: bias 0.5, full 2"
    )  # fmt: skip
    assert Contributions.loads(found.dumps()).values == values
