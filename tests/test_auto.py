from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from edgetune.core.apply import apply, finalize
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.technique import Sample
from edgetune.lean.saved import saved_bytes
from edgetune.sparse.auto.account import CostModel
from edgetune.sparse.auto.choose import choose
from edgetune.sparse.scheme import Slice
from edgetune.sparse.update import SparseUpdate
from support.law_models import Mlp
from support.laws import mlp
from support.schemes import loss, rows

torch.set_num_threads(1)

MIB = 2**20


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def sample() -> Sample:
    batches = rows(64, 8)
    return Sample(batches[0][0], lambda: iter([x for x, _ in batches]), lambda: iter(batches), loss)


# The choice


def _choose(model: nn.Module, budget_mib: float, **settings: Any) -> Any:
    return choose(model, sample(), budget_mib, under=SparseUpdate().under(model), **settings)


def test_auto_stays_in_its_budget_and_does_more_with_more() -> None:
    model = Mlp(64)
    profile = CostModel.of(model, rows(8, 8)[0], loss, SparseUpdate().under(model))
    whole = profile.account({n: "full" for n, _ in model.named_modules()}).total_bytes / MIB
    chosen = [_choose(model, share * whole) for share in (0.45, 0.6, 0.8, 1.01)]
    for share, found in zip((0.45, 0.6, 0.8, 1.01), chosen, strict=True):
        assert found.account.total_bytes <= share * whole * MIB
    assert [c.value for c in chosen] == sorted(c.value for c in chosen)
    assert all(c.scheme.part("classifier") == "full" for c in chosen)
    assert all(choice.training == choice.parameters for choice in chosen[-1].scheme.choices)
    trained = SparseUpdate(scheme=chosen[0].scheme.to_mapping()).resolve(model)
    assert trained.choices == chosen[0].scheme.choices


def test_auto_predicts_what_its_scheme_keeps() -> None:
    from edgetune.lean.saved import saved_bytes

    model, batch = Mlp(64), rows(64, 8)[0]
    found = _choose(model, 0.25)
    written = {n: _by_magnitude(part) for n, part in found.scheme.to_mapping().items()}
    trained = SparseUpdate(scheme=written).apply(model)
    assert found.account.saved_bytes == saved_bytes(trained, batch[0], lambda output: loss(output, batch[1]))


def _by_magnitude(part: Any) -> Any:
    return Slice(ratio=part.ratio) if isinstance(part, Slice) else part


def test_auto_says_the_least_that_can_be_had() -> None:
    with pytest.raises(EdgetuneError, match=r"no scheme fits 0.0 MiB; the lowest possible is") as error:
        _choose(mlp(), 0.01)
    assert error.value.exit_code == Exit.BUDGET
    with pytest.raises(EdgetuneError, match=r"and 0 ms a step"):
        _choose(mlp(), 100.0, step_ms=0.0)


def test_auto_heeds_the_settings_of_the_technique() -> None:
    found = _choose(mlp(), 100.0, head="frozen", norms=False)
    parts = {choice.layer: choice.part for choice in found.scheme.choices}
    assert parts["classifier"] == parts["blocks.1.norm"] == "frozen"
    assert parts["blocks.1.up"] == "full"


def test_auto_with_a_time_limit_answers_the_same_again() -> None:
    model = mlp()
    one, two = _choose(model, 100.0, step_ms=1e6), _choose(model, 100.0, step_ms=1e6)
    assert one.scheme == two.scheme


def test_auto_needs_labels() -> None:
    with pytest.raises(EdgetuneError, match="batches with labels and a loss are needed"):
        SparseUpdate(scheme="auto", budget_mib=10.0).resolve(mlp(), Sample.of(rows(8, 0)[0][0]))


def test_a_choice_prints() -> None:
    text = str(_choose(mlp(), 100.0))
    assert text.startswith("scheme auto: 13,923 of 13,923 parameters train")
    assert "predicted auto:" in text
    assert "contributions by fisher: 100 % of all" in text


# The technique


def test_auto_trains_within_its_budget_and_writes_down_what_it_chose(tmp_path: Path) -> None:
    technique = SparseUpdate(scheme="auto", budget_mib=0.15)
    model = apply(mlp(), technique, sample())
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    inputs, labels = rows(64, 8)[0]
    model.train()
    loss(model(inputs), labels).backward()
    optimizer.step()
    state = sum(v.nbytes for entry in optimizer.state.values() for v in entry.values())
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    weights = sum(p.nbytes for p in mlp().parameters())
    kept = saved_bytes(model, inputs, lambda output: loss(output, labels))
    assert weights + gradients + state + kept <= 0.15 * MIB
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    technique.save(model, tmp_path)
    written = yaml.safe_load((tmp_path / "scheme.yaml").read_text())["scheme"]
    again = SparseUpdate(scheme=written)
    assert again.resolve(mlp()).choices == technique.resolve(mlp(), sample()).choices
    assert [type(m) for m in finalize(model).modules()] == [type(m) for m in mlp().modules()]


@pytest.mark.parametrize("by", ["gradient", "fisher"])
def test_a_slice_takes_the_channels_that_gradients_point_to(by: Any) -> None:
    batches = rows(64, 8)
    for inputs, _ in batches:
        inputs[:, 8:] = 0  # so that no other input of the stem has a gradient
    found = Sample(batches[0][0], lambda: iter([]), lambda: iter(batches), loss)
    model = apply(mlp(), SparseUpdate(scheme={"stem": Slice(ratio=0.25, by=by), "classifier": "full"}), found)
    assert model.stem.indices.tolist() == list(range(8))
    with pytest.raises(EdgetuneError, match="batches with labels and a loss are needed"):
        apply(mlp(), SparseUpdate(scheme={"stem": Slice(ratio=0.25, by=by)}), Sample.of(batches[0][0]))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"scheme": "auto"}, "go together"),
        ({"scheme": "last-1", "budget_mib": 10}, "go together"),
        ({"scheme": "last-1", "step_ms": 10}, "a limit for scheme"),
        ({"scheme": "auto", "budget_mib": 0}, "must be more than 0"),
    ],
)
def test_settings_that_do_not_fit_each_other(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(EdgetuneError, match=what):
        SparseUpdate(**settings)
