"""The order of steps follows from traits alone; what a technique adds to the loss is trained on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import edgetune as et
from edgetune.core import registry
from edgetune.core.order import plan_steps
from edgetune.core.technique import StepSettings
from edgetune.core.traits import Trait
from edgetune.data.dataset import Split
from edgetune.data.rows import Rows
from edgetune.recipe import recipe
from edgetune.recipe.outline import outline
from edgetune.recipe.sections import Finalize
from edgetune.run.fold import Eval, Fold
from edgetune.tasks.image_classification import ImageClassification
from edgetune.train.loop import train
from support.checkpoints import save_bert, save_rows
from support.laws import mlp, vectors

LORA, SCHEME, TRAIN = et.LoRA(rank=2, targets=("*.up",)), et.SparseUpdate(scheme="last-1"), et.Train(updates=2)


def walked(*steps: StepSettings, opened: tuple[StepSettings, ...] = ()) -> list[Any]:
    """Indices of the steps as they come; a tuple of names: what is finalized there."""
    return [move.finalizes or move.index for move in plan_steps(steps, opened)]


def test_what_is_open_and_not_taken_is_finalized_first() -> None:
    assert walked(SCHEME, LORA, TRAIN, et.Prune(), TRAIN, et.Int4()) == [0, 1, 2, ("lora", "sparse-update"), 3, 4, 5]
    assert walked(et.NF4(), LORA, TRAIN, et.Int8()) == [0, 1, 2, ("lora", "nf4"), 3]
    assert walked(SCHEME, TRAIN, SCHEME) == [0, 1, ("sparse-update",), 2]
    assert walked(LORA, Finalize(), LORA) == [0, ("lora",), 2]
    assert walked(et.Prune(), opened=(LORA,)) == [("lora",), 0]
    assert walked(Eval(), et.Prune(), Eval(), et.Int4(), Eval()) == [0, 1, 2, 3, 4]


def test_it_says_what_stays_open_and_why_it_finalizes() -> None:
    plan = plan_steps([SCHEME, LORA, TRAIN, et.Int4()])
    assert [move.open for move in plan] == [
        ("sparse-update",), ("sparse-update", "lora"), ("sparse-update", "lora"), (), (),
    ]  # fmt: skip
    assert plan[3].reason == "int4 needs plain layers"
    assert plan_steps([SCHEME, SCHEME])[1].reason == "sparse-update is already applied"


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ([et.Int4(), LORA], "lora: cannot follow int4, which leaves integer weights\n  next: put lora before int4"),
        (
            [et.Int8Dynamic(), et.Int4()],
            "integer weights\n  next: keep one of int8_dynamic and int4",
        ),
        ([et.Int8(), TRAIN], "train: cannot follow int8, which leaves integer weights"),
        ([et.Int4(), et.Int4()], "int4: occurs twice"),
        ([LORA, TRAIN, LORA], "lora: cannot follow lora, which leaves adapters\n  next: finalize between the two"),
        ([LORA, SCHEME], "put sparse-update before lora, or finalize between the two"),
        ([SCHEME, et.NF4()], "nf4: cannot follow sparse-update, which leaves frozen layers"),
        ([Finalize()], "finalize: there is nothing to finalize here"),
        ([et.Int4(), Finalize()], "finalize: there is nothing to finalize here"),
    ],
)
def test_what_cannot_stand_there(steps: list[StepSettings], text: str) -> None:
    with pytest.raises(et.EdgetuneError) as error:
        plan_steps(steps)
    assert text in str(error.value)


def test_every_wrong_step_is_named_at_once() -> None:
    with pytest.raises(et.EdgetuneError) as error:
        plan_steps([et.Int4(), LORA, TRAIN, Finalize()], place=lambda n: f"step {n + 1}")
    lines = [line for line in str(error.value).splitlines() if line.startswith("step")]
    assert [line[:6] for line in lines] == ["step 2", "step 3"]


def test_order_and_data_are_checked_before_anything_is_applied() -> None:
    model = mlp()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for techniques in ([SCHEME, et.NF4()], [LORA, et.Prune()], [LORA, et.SparseUpdate(scheme="auto", budget_mib=1)]):
        with pytest.raises(et.EdgetuneError):
            et.apply(model, techniques)
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
        assert not any("edgetune" in name for name in vars(model))


class Decay(et.Technique):
    """A toy: weights are pulled to zero while it is open."""

    name: ClassVar[str] = "decay"
    takes: ClassVar[Trait] = Trait.FROZEN
    strength: float = 0.1

    def apply(self, model: nn.Module, sample: et.Sample | None = None) -> nn.Module:
        return model

    def finalize(self, model: nn.Module) -> nn.Module:
        return model

    def penalty(self, model: nn.Module) -> Tensor | None:
        return self.strength * torch.stack([p.square().sum() for p in model.parameters() if p.requires_grad]).sum()


def test_what_leaves_no_trait_is_finalized_before_a_step_that_takes_plain_layers() -> None:
    assert walked(Decay(), TRAIN, et.Int4()) == [0, 1, ("decay",), 2]
    assert walked(Decay(), LORA, TRAIN) == [0, 1, 2]


def test_training_adds_the_penalties_of_what_is_open() -> None:
    rows = vectors()
    assert isinstance(rows, Tensor)
    data = Rows(list(rows), [0, 1, 2, 0, 1, 2])
    split = Split(ImageClassification(("a", "b", "c")), data, lambda rows, _: torch.stack(list(rows)))
    settings = et.Train(updates=4, batch_size=3, learning_rate=1e-2)
    loss = nn.functional.cross_entropy
    model = mlp()
    added, by_hand, plain, closed = (copy.deepcopy(model) for _ in range(4))
    et.apply(added, [SCHEME, Decay(), Decay(strength=0.3)])
    total = et.penalty(added)
    expected = 0.4 * sum(p.square().sum() for p in added.parameters() if p.requires_grad)
    assert total is not None
    torch.testing.assert_close(total, expected)
    train(added, settings, split, loss, seed=1)

    et.apply(by_hand, SCHEME)
    pull = Decay(strength=0.4)
    train(by_hand, settings, split, lambda out, labels: loss(out, labels) + pull.penalty(by_hand), seed=1)
    train(et.apply(plain, SCHEME), settings, split, loss, seed=1)
    torch.testing.assert_close(et.finalize(added).state_dict(), et.finalize(by_hand).state_dict())
    assert not added.classifier.weight.equal(et.finalize(plain).classifier.weight)
    assert et.penalty(added) is None
    assert et.penalty(closed) is None


def test_a_new_technique_runs_in_a_recipe_without_an_edit_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(registry.TECHNIQUES, "gain", "support.gain:Gain")
    save_bert(tmp_path / "encoder", "Model", hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    save_rows(tmp_path / "rows.csv")
    text = """
model: {source: "hf:encoder", max_length: 8}
data: csv:rows.csv
steps:
  - sparse-update: {scheme: last-1}
  - gain: {targets: ["*.layer.0.*.query"]}
  - train: {updates: 2, batch_size: 8}
  - int4
"""
    chosen = recipe.parse(text, "r.yaml")
    assert [(line.step, line.name) for line in outline(chosen)] == [
        (1, "sparse-update"), (2, "gain"), (3, "train"), (None, "finalize"), (4, "int4"),
    ]  # fmt: skip
    fold = Fold(chosen, tmp_path, resume=False, progress=lambda *_: None, record=False)
    query = "bert.encoder.layer.0.attention.self.query"
    before = fold.model.get_parameter(f"{query}.weight").detach().clone()
    fold.steps()
    after = fold.model.get_submodule(query).weight
    assert type(after) is not nn.Parameter or after.dtype != torch.float32 or not after.is_floating_point()
    ratio = after.dequantize() / before  # type: ignore[operator]
    assert not torch.allclose(ratio, torch.ones_like(ratio), atol=1e-3)
