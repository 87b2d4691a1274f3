"""share: the mapping, the start, the gradients, and what is smaller while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgetune as et
from edgetune.core.apply import apply, finalize
from edgetune.core.errors import EdgetuneError
from edgetune.lean.saved import saved_bytes
from edgetune.quant.share import Share, fold
from edgetune.quant.shared_linear import SharedLinear, shared_layers
from edgetune.quant.size import stored_bytes
from edgetune.train.resume import changing_tensors
from support.laws import BLOCKS, fit, logits, loss_of, mlp, vectors


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight.detach() for name, layer in shared_layers(model).items()}


def pool_of(model: nn.Module) -> nn.Parameter:
    return next(iter(shared_layers(model).values())).pool


def test_cells_are_shared_evenly() -> None:
    places = fold(100, 30, torch.Generator().manual_seed(0))
    counts = torch.bincount(places, minlength=30)
    assert set(counts.tolist()) == {3, 4}
    assert counts.sum() == 100
    assert places[:30].sort().values.tolist() == list(range(30)), "each fold is a permutation"
    assert places[:30].tolist() != list(range(30))


def test_a_pool_of_all_weights_changes_nothing() -> None:
    model = apply(mlp(), Share(ratio=1, block_size=32))
    torch.testing.assert_close(logits(model, vectors()), logits(mlp(), vectors()), atol=1e-6, rtol=1e-5)
    assert pool_of(model).numel() == sum(m.weight.numel() for m in mlp().modules() if isinstance(m, nn.Linear))


def test_the_pool_starts_nearest_to_the_weights_in_units_of_each_layers_scale() -> None:
    plain = mlp()
    with torch.no_grad():
        for block in plain.blocks:  # type: ignore[union-attr]
            block.up.weight *= 5  # type: ignore[union-attr, operator]
    before = {name: m.weight.detach().clone() for name, m in plain.named_modules() if isinstance(m, nn.Linear)}
    model = apply(plain, Share(ratio=0.4, targets=BLOCKS))

    def error() -> float:
        shared = weights_of(model)
        return sum(float((w - before[n]).square().sum() / before[n].square().mean()) for n, w in shared.items())

    pool, best = pool_of(model), error()
    with torch.no_grad():
        for seed in range(5):
            step = 1e-2 * torch.randn(pool.shape, generator=torch.Generator().manual_seed(seed))
            for moved in (step, -2 * step):
                pool += moved
                assert error() > best
            pool += step
    for name, weight in weights_of(model).items():
        assert 0.5 < float((weight - before[name]).norm() / before[name].norm()) < 0.9, "no layer is lost in another"


def test_gradients_are_those_of_the_pool_divided_by_its_sharing() -> None:
    plain, scaled = (apply(mlp(), Share(ratio=0.3, targets=BLOCKS, scale_gradients=on)) for on in (False, True))
    for model in (plain, scaled):
        loss_of(model(vectors())).backward()
    layers = shared_layers(plain)
    dense = mlp()
    for name, weight in weights_of(plain).items():
        dense.get_submodule(name).weight = nn.Parameter(weight)
    loss_of(dense(vectors())).backward()
    scales, sharing, expected = (torch.zeros(len(pool_of(plain)), 64) for _ in range(3))
    for name, layer in layers.items():
        gradient = dense.get_submodule(name).weight.grad.view(-1, 64)  # type: ignore[union-attr, operator]
        expected.index_add_(0, layer.places, gradient * layer.factors[:, None])
        scales.index_add_(0, layer.places, layer.factors.abs()[:, None].expand(-1, 64))
        sharing.index_add_(0, layer.places, torch.ones_like(gradient))
    torch.testing.assert_close(pool_of(plain).grad, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pool_of(scaled).grad, expected / (scales.square() / sharing), atol=1e-4, rtol=1e-4)
    for name, parameter in dense.named_parameters():
        if name.endswith("bias"):
            torch.testing.assert_close(scaled.get_parameter(name.replace(".bias", ".base.bias")
                                       if name.rpartition(".")[0] in layers else name).grad, parameter.grad,
                                       atol=1e-4, rtol=1e-4)  # fmt: skip


def test_training_state_and_checkpoints_are_smaller_and_nothing_more_is_saved_for_backward() -> None:
    plain, model = mlp(), apply(mlp(), Share(ratio=0.1, targets=BLOCKS))
    kept = [sum(t.nbytes for t in changing_tensors(each).values()) for each in (plain, model)]
    assert kept[1] < 0.45 * kept[0]
    assert stored_bytes(model) < 0.45 * stored_bytes(plain)
    state = model.state_dict()
    assert [name for name in state if name.endswith(".pool")] == ["blocks.0.up.pool"]
    assert sum(value.nbytes for value in state.values()) < 0.45 * stored_bytes(plain)
    saved = [saved_bytes(each, vectors(), loss_of) for each in (plain, model)]
    assert saved[1] <= saved[0]
    fit(model, vectors())
    other = apply(mlp(), Share(ratio=0.1, targets=BLOCKS))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, vectors()), logits(model, vectors()))
    assert len({id(layer.pool) for layer in shared_layers(other).values()}) == 1


@pytest.mark.parametrize("on", [True, False])
def test_sgd_is_stable_where_gradients_are_scaled(on: bool) -> None:
    x, turn = (torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows)) for rows in (128, 32))
    y = x @ turn / 32**0.5
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False))
    model = apply(model, Share(ratio=1 / 32, block_size=32, scale_gradients=on))
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)  # without sharing it is stable too
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert (losses[-1] < losses[0]) == on


def test_it_computes_in_autocasts_type() -> None:
    model = apply(mlp(), Share(targets=("stem",)))
    with torch.autocast("cpu", torch.bfloat16):
        y = model.stem(vectors())
        y.float().sum().backward()
    assert y.dtype is torch.bfloat16
    assert pool_of(model).grad is not None
    assert pool_of(model).grad.dtype is torch.float32  # type: ignore[union-attr]
    torch.testing.assert_close(y.float(), mlp_stem(model), atol=5e-2, rtol=5e-2)


def mlp_stem(model: Any) -> Tensor:
    with torch.no_grad():
        return nn.functional.linear(vectors(), model.stem.weight, model.stem.bias)  # type: ignore[arg-type]


def test_its_note_says_what_stays() -> None:
    technique = et.Share(targets=BLOCKS)
    model = apply(mlp(), technique)
    assert technique.note(model) == (
        "12.3 k weights of 6 linears read 6.14 k shared parameters; training and its checkpoints are smaller, the "
        "program is not"
    )
    model = finalize(model)
    assert "as large as without share" in technique.note(model)
    assert stored_bytes(model) == stored_bytes(mlp())
    assert not any(isinstance(module, SharedLinear) for module in model.modules())


def test_what_cannot_share_is_refused() -> None:
    with pytest.raises(EdgetuneError, match=r"block_size 7 does not divide the 1,024 weights of stem[\s\S]*set .* 1"):
        apply(mlp(), Share(block_size=7))
    frozen = mlp()
    frozen.stem.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    with pytest.raises(EdgetuneError, match=r"stem is frozen[\s\S]*skip"):
        apply(frozen, Share())
    mixed: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).bfloat16())
    with pytest.raises(EdgetuneError, match="1 has another type or device than 0"):
        apply(mixed, Share())
    tied: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[0].weight = tied[1].weight
    with pytest.raises(EdgetuneError, match="shares its weight"):
        apply(tied, Share())
    broken = mlp()
    with torch.no_grad():
        broken.stem.weight[0, 0] = torch.nan  # type: ignore[union-attr, index]
    with pytest.raises(EdgetuneError, match="NaN"):
        apply(broken, Share())
    assert not shared_layers(broken)


def test_a_run_trains_the_pool_and_ends_with_plain_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.checkpoints import run_steps

    monkeypatch.chdir(tmp_path)
    ledger = run_steps("share: {ratio: 0.25, skip: [classifier]}, train: {updates: 2, batch_size: 8}, int8_dynamic")
    load, share, train, plain, _ = ledger.rows
    assert [row.step for row in ledger.rows] == ["load", "share", "train", "finalize", "int8_dynamic"]
    assert share.trainable_parameters == train.trainable_parameters < 0.7 * load.trainable_parameters
    assert share.size_mib < 0.75 * load.size_mib
    assert (plain.parameters, plain.size_mib) == (load.parameters, load.size_mib)
    assert "the program is not" in share.note
    assert plain.note == "the shared weights are written out in full: the program is as large as without share"
    assert ledger.trainings[0].gradients_mib < 0.7 * load.size_mib
