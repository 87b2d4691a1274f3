from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import cnn, llama, mlp
from schemes import loss, rows
from torch import Tensor

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.inputs import Inputs
from edgetune.sparse.auto import contribution
from edgetune.sparse.auto.contribution import (
    Contributions,
    candidates,
    channel_scores,
    contributions,
    each_gradient,
    weight_scores,
)
from edgetune.sparse.auto.trials import Analysis
from edgetune.sparse.scheme import Slice

torch.set_num_threads(1)

MIB = 2**20


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


# Fisher information


def test_fisher_is_the_root_of_squared_gradients_by_channel() -> None:
    model, batches = mlp(), rows(16, 0)
    found = contributions(model, batches, [], loss, Analysis(rows_at_once=8), head=["classifier"])
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
        found = contributions(cnn(), _pictures(), [], loss, Analysis(by=mode), cache=False)  # type: ignore[arg-type]
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


def test_channels_are_scored_by_magnitude_gradient_and_fisher() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    gradients = [torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[-1.0, 2.0], [4.0, 1.0]])]
    assert channel_scores(weight, [], "magnitude", "inputs").tolist() == [4.0, 6.0]
    assert channel_scores(weight, gradients, "gradient", "inputs").tolist() == [2.0, 3.0]
    assert channel_scores(weight, gradients, "fisher", "outputs").tolist() == [5.0, 9.0]
    with pytest.raises(EdgetuneError, match="need gradients"):
        channel_scores(weight, [], "fisher", "inputs")


def test_weight_scores_have_the_weights_shape_and_agree_with_channel_scores() -> None:
    model, batches = mlp(), rows(16, 2)
    gradients = []
    for inputs, labels in batches:
        model.zero_grad()
        loss(model(inputs), labels).backward()
        gradients.append(model.blocks[0].up.weight.grad.clone())
    for by in ("gradient", "fisher"):
        scores = weight_scores(mlp(), ["blocks.0.up"], batches, loss, by, rows_at_once=8)["blocks.0.up"]  # type: ignore[arg-type]
        expected = channel_scores(model.blocks[0].up.weight, gradients, by, "inputs")  # type: ignore[arg-type]
        assert torch.allclose(scores.sum(0), expected, rtol=1e-4, atol=1e-9)


def test_layers_that_share_a_weight_are_no_candidates() -> None:
    names = candidates(llama(tied=True), ["model.norm"])
    assert "lm_head" not in names
    assert "model.embed_tokens" not in names
    assert "model.norm" not in names
    assert "model.layers.1.mlp.up_proj" in names


# Short trainings


def test_training_one_layer_at_a_time_tells_what_it_is_worth() -> None:
    model = mlp()
    with torch.no_grad():  # a block whose output is thrown away can teach nothing
        for parameter in model.blocks[1].down.parameters():
            parameter.zero_()
    dead = copy.deepcopy(model)
    for parameter in dead.blocks[1].norm.parameters():
        parameter.data.zero_()
    before = copy.deepcopy(dead.state_dict())
    analysis = Analysis(mode="train", ratios=(0.25,), updates=12, learning_rate=1e-2)
    found = contributions(dead, rows(96, 4), rows(64, 5), loss, analysis, head=["classifier"])
    assert all(torch.equal(value, before[name]) for name, value in dead.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in dead.parameters())
    assert found.values["stem"]["full"] > 0.05
    assert found.values["blocks.1.up"]["full"] < 0.1 * found.values["stem"]["full"]
    for own in found.values.values():
        assert list(own.values()) == sorted(own.values())


def test_short_trainings_need_rows_held_out() -> None:
    with pytest.raises(EdgetuneError, match="batches with labels") as error:
        contributions(mlp(), rows(8, 0), [], loss, Analysis(mode="train"))
    assert error.value.exit_code == Exit.DATA


# The cache


def test_the_result_is_kept_by_weights_data_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = mlp(), rows(16, 6)
    first = contributions(model, batches, [], loss)
    again = contributions(model, batches, [], loss)
    assert not first.cached
    assert again.cached
    assert again.values == first.values
    assert not contributions(model, batches, [], loss, Analysis(seed=1)).cached
    assert not contributions(model, rows(16, 7), [], loss).cached
    with torch.no_grad():
        model.stem.bias[0] += 1
    assert not contributions(model, batches, [], loss).cached
    monkeypatch.setattr(contribution, "by_fisher", lambda *_: pytest.fail("was to be read from the cache"))
    assert contributions(model, batches, [], loss).cached


def test_contributions_print() -> None:
    values: dict[str, dict[Any, float]] = {"a": {"bias": 0.5, "full": 2.0}, "b": {Slice(ratio=0.25, by="fisher"): 3.0}}
    found = Contributions("fisher", values)
    assert str(found) == (
        "contributions by fisher, of 2 layers the best:\n"
        "  b: 1/4 by fisher 3\n"
        "  a: bias 0.5, full 2"
    )  # fmt: skip
    assert Contributions.loads(found.dumps()).values == values
