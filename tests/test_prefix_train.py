"""Training with `cache_prefix`: resumed after a kill with the same bits, with accumulation, and validated uncached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from edgetune.core.errors import EdgetuneError
from edgetune.core.ledger import Quality
from edgetune.train.loop import TrainResult, train
from edgetune.train.settings import Train
from support.laws import bert
from support.prefixes import Counting, bits, sparse, texts

torch.set_num_threads(1)


def trained(model: nn.Module, prefixes: Path, **options: Any) -> TrainResult:
    values = {"epochs": 3, "batch_size": 4, "accumulate": 2, "learning_rate": 1e-2, "checkpoint_every": 1}
    settings = Train(**{**values, "cache_prefix": True, **options.pop("settings", {})})
    return train(model, settings, texts(), functional.cross_entropy, seed=3, prefixes=prefixes, **options)


@pytest.mark.parametrize(
    "settings", [{}, {"cache_dtype": "fp16"}, {"accumulate": 1, "clip_norm": None, "in_backward": True}]
)
@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_training_ends_with_the_same_bits(settings: dict[str, Any], stop: int, tmp_path: Path) -> None:
    whole = sparse(bert(3))
    expected = trained(whole, tmp_path / "a", settings=settings)
    stopped = sparse(bert(3))

    def press(done: int, *_: object) -> None:
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(stopped, tmp_path / "b", settings=settings, folder=tmp_path / "run", progress=press)
    assert not any("forward" in module.__dict__ for module in stopped.modules())
    resumed = sparse(bert(3))
    result = trained(resumed, tmp_path / "b", settings=settings, folder=tmp_path / "run", resume=True)
    assert result.losses == expected.losses
    assert bits(resumed) == bits(whole)
    assert result.prefix is not None
    assert result.prefix.misses < len(texts())
    again = trained(sparse(bert(3)), tmp_path / "b", settings=settings, folder=tmp_path / "run", resume=True)
    assert (again.prefix, again.losses) == (None, expected.losses)  # nothing was left to do


def test_losses_are_those_without_a_cache(tmp_path: Path) -> None:
    cached, plain = sparse(bert(3)), sparse(bert(3))
    result = trained(cached, tmp_path)
    expected = trained(plain, tmp_path, settings={"cache_prefix": False})
    assert expected.prefix is None
    assert [p.loss for p in result.losses] == pytest.approx([p.loss for p in expected.losses], rel=1e-4)


def test_validation_runs_the_whole_model(tmp_path: Path) -> None:
    model = sparse(bert(3))
    inside = Counting(model, "bert.encoder.layer.0.attention")
    seen: list[int] = []

    def validation(model: nn.Module) -> Quality:
        before = inside.count
        inputs, _ = texts().batch([0, 1])
        with torch.no_grad():
            model(**inputs)
        seen.append(inside.count - before)
        return Quality(metric="accuracy_pct", value=float(len(seen)), rows=2)

    result = trained(model, tmp_path, validation=validation, settings={"keep_best": True})
    assert seen == [1, 1, 1]
    assert result.best is not None
    assert result.best.value == 3


def test_without_a_frozen_prefix_training_does_not_begin(tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match="nothing is frozen"):
        trained(bert(3), tmp_path)
