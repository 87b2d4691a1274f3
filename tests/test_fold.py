"""Law: what a recipe does to a model is what `et.apply` does with its steps in order, to the bit."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import nn

import edgetune as et
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import call, logits_of
from edgetune.core.technique import Technique
from edgetune.recipe import recipe
from edgetune.recipe.recipe import Recipe
from edgetune.run.fold import Fold
from edgetune.run.prepared import prepare
from edgetune.run.rehearsal import rehearse
from edgetune.train.loop import seed_everything, train
from edgetune.train.settings import Train
from support.checkpoints import save_bert, save_rows

RECIPES = {
    "sparse, adapted, pruned, distilled, quantized": """
  - sparse-update: {scheme: last-1}
  - lora: {rank: 2, targets: ["*.layer.0.*.query"]}
  - train: {updates: 3, batch_size: 8}
  - prune: {ratio: 0.3, what: [ffn], importance: activation}
  - train: {updates: 2, batch_size: 8, distill: {teacher: prune}}
  - int4
""",
    "shorter, and taught by hidden states": """
  - train: {updates: 2, batch_size: 8}
  - depth: {blocks: 1}
  - train: {updates: 3, batch_size: 8, distill: {teacher: depth, hidden: 2}}
  - int8_dynamic
""",
    "finalized between": """
  - lora: {rank: 2, targets: ["*.query"]}
  - finalize
  - sparse-update: {scheme: bias}
  - train: {updates: 2, batch_size: 8}
  - int8
""",
    "rounded while it trains": """
  - lora: {rank: 2, targets: ["*.query", "*.value"]}
  - qat: {distill: 0.5}
  - train: {updates: 3, batch_size: 8}
  - int4: {group_size: channel, calibration_batches: 2}
""",
    "rounded from its own weights": """
  - qat: {algorithm: absmax}
  - train: {updates: 2, batch_size: 8}
  - int4
""",
    "on a 4-bit base": """
  - nf4: {block_size: 64}
  - lora: {rank: 2, targets: ["*.query", "*.value"]}
  - train: {updates: 2, batch_size: 8}
  - prune: {ratio: 0.5, what: [ffn], round_to: 8}
""",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    save_bert(tmp_path / "encoder", "Model", **sizes)
    save_rows(tmp_path / "rows.csv")
    return tmp_path


def read(steps: str) -> Recipe:
    return recipe.parse(f"model: {{source: 'hf:encoder', max_length: 8}}\ndata: csv:rows.csv\nsteps:{steps}", "r.yaml")


def begun(chosen: Recipe, folder: Path) -> Fold:
    return Fold(chosen, folder, resume=False, progress=lambda *_: None, record=False)


def by_hand(fold: Fold, chosen: Recipe) -> nn.Module:
    """The recipe's steps with `et.apply`, `et.finalize` and `train`, on a copy of the fold's first model."""
    model, sample = copy.deepcopy(fold.model), fold.sample()
    teacher: nn.Module | None = None
    for index, step in enumerate(chosen.steps):
        seed_everything(chosen.seed + 1000 * (index + 1))
        if step.name in ("prune", "depth"):
            model = et.finalize(model)
            teacher = copy.deepcopy(model).eval().requires_grad_(False)
        if isinstance(step.settings, Technique):
            model = et.apply(model, step.settings, sample)
        elif isinstance(step.settings, Train):
            taught = teacher if step.settings.distill else None
            train(model, step.settings, fold.train_split, fold.loss, seed=chosen.seed + index, teacher=taught)
        else:
            model = et.finalize(model)
    return et.finalize(model).eval()


def same(left: nn.Module, right: nn.Module) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        packed = type(tensor) is not torch.Tensor
        left_values, right_values = (each.dequantize() if packed else each for each in (tensor, theirs[name]))
        assert left_values.equal(right_values), name


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_et_apply_of_its_steps(name: str, folder: Path) -> None:
    chosen = read(RECIPES[name])
    fold = begun(chosen, folder)
    expected = by_hand(fold, chosen)
    fold.steps()
    same(fold.model, expected)
    inputs = fold.samples.example()
    with torch.no_grad():
        left, right = (logits_of(call(model, inputs)) for model in (fold.model, expected))
    assert left.equal(right)


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_prepared_for_a_training_elsewhere_is_what_the_fold_trains(name: str, folder: Path) -> None:
    chosen = read(RECIPES[name])
    place = next(n for n, step in enumerate(chosen.steps) if isinstance(step.settings, Train))
    fold = begun(chosen, folder)
    fold.steps(until=place)
    same(prepare(chosen).model, fold.model)


def test_int4_calibrates_on_training_rows_in_the_run_and_not_in_its_rehearsal(folder: Path) -> None:
    chosen = read("\n  - train: {updates: 1}\n  - int4: {calibration_batches: 9}")
    fold, technique = begun(chosen, folder), chosen.steps[1].settings
    assert isinstance(technique, et.Int4)
    batches = list(fold.sample(technique).batches())
    expected = [fold.train_split.batch([row], pad_to=8)[0] for row in range(len(fold.train_split))]
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(
            torch.cat([batch[name] for batch in batches]),  # type: ignore[call-overload, index]
            torch.cat([row[name] for row in expected]),  # type: ignore[call-overload, index]
        )

    def read_batches() -> NoReturn:
        raise AssertionError("a rehearsal reads no batches")

    rehearse(chosen, fold.model, replace(fold.sample(), batches=read_batches), fold.samples.example(), lambda *_: None)
    by_gptq = begun(chosen, folder)
    by_gptq.steps()
    rounded = et.apply(begun(chosen, folder).model, et.Int4(algorithm="absmax"))
    codes = [model.bert.encoder.layer[1].output.dense.weight.qdata for model in (by_gptq.model, rounded)]  # type: ignore[index, union-attr]
    assert float((codes[0] != codes[1]).float().mean()) > 0.05


def test_a_learning_rate_ratio_without_lora_is_refused_before_the_training(folder: Path) -> None:
    chosen = read("\n  - sparse-update: {scheme: last-1}\n  - train: {updates: 1, learning_rate_ratio: 16}")
    with pytest.raises(EdgetuneError, match=r"step 2, train.* no B matrix .*\(found before any training\)"):
        begun(chosen, folder).rehearse()


def test_hidden_states_of_another_shape_are_refused_before_the_training(folder: Path) -> None:
    taught = "train: {updates: 1, distill: {teacher: prompt, hidden: 1}}"
    chosen = read(f"\n  - train: {{updates: 1}}\n  - prompt: {{kind: prompt, tokens: 2}}\n  - {taught}")
    with pytest.raises(EdgetuneError, match=r"step 3, train.*another shape than .*\(found before any training\)"):
        begun(chosen, folder).rehearse()


def test_a_technique_gets_as_many_batches_as_it_asks_for(folder: Path) -> None:
    header, *rows = (folder / "rows.csv").read_text(encoding="utf-8").splitlines()
    texts = [f"{n} {row}" for n in range(6) for row in rows]
    (folder / "rows.csv").write_text("\n".join([header, *texts]), encoding="utf-8")
    fold = begun(read("\n  - int8"), folder)
    assert len(fold.train_split) > 12 * 16
    assert len(list(fold.sample(et.Int8(calibration_batches=3)).batches())) == 8, "it reads the first 3 of them"
    assert len(list(fold.sample(et.Int8(calibration_batches=12)).batches())) == 12
