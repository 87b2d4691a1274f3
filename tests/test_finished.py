"""Law: a finished run, opened again, is the very model that the run ended with, and nothing is done to get it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import edgetune as et
from edgetune.core.inputs import call, logits_of
from edgetune.core.technique import Technique
from edgetune.quant.size import parameter_count, stored_bytes
from edgetune.recipe.recipe import Recipe, load, packaged_recipes
from edgetune.run.exporting import export_from
from edgetune.run.finished import open_run
from edgetune.run.fold import Fold
from support.checkpoints import save_bert, save_images, save_llama, save_rows

TEXT = "model: {source: 'hf:encoder', max_length: 8}\ndata: csv:rows.csv"
LANGUAGE = "model: {source: 'hf:writer', max_length: 8}\ndata: {source: 'csv:rows.csv', label: null}"
IMAGES = "model: {source: 'py:net.py:build', image_px: 16}\ndata: 'imagefolder:images'"
RUNS = {
    "adapted": (TEXT, "[lora: {rank: 2, targets: ['*.query']}, train: {updates: 2, batch_size: 8}]"),
    "pruned, sparse, 4 bits": (
        TEXT,
        "[prune: {ratio: 0.5, round_to: 32}, sparse-update: {scheme: last-1}, train: {updates: 2}, int4]",
    ),
    "shorter, 4 bits": (TEXT, "[depth: {blocks: 1}, train: {updates: 1}, int4]"),
    "a shorter language model": (LANGUAGE, "[depth: {blocks: [1]}, train: {updates: 1}]"),
    "pruned to odd widths, padded": (
        TEXT, "[prune: {ratio: 0.3, round_to: 4}, train: {updates: 1}, int4: {pad: true, group_size: channel}]",
    ),
    "pruned, with bottlenecks, 4 bits": (
        TEXT,
        "[prune: {ratio: 0.5, round_to: 32}, bottleneck: {targets: ['*.output.dense'], width: 8, activation: gelu}, "
        "train: {updates: 2}, int4: {pad: true}]",
    ),
    "searched": (
        TEXT,
        "[glora: {rank: 2, targets: ['*.query']}, train: {updates: 2}, "
        "glora-search: {max_parameters: 300, population: 4, generations: 1}, train: {updates: 2}]",
    ),
    "pruned, beside frozen blocks, 8 bits": (
        TEXT,
        "[prune: {ratio: 0.5, round_to: 32}, sparse-update: {scheme: {'*': frozen, classifier: full}}, "
        "sherl: {width: 4}, train: {updates: 2}, int8_dynamic]",
    ),
    "from a 4-bit base": (TEXT, "[nf4: {block_size: 64}, lora: {rank: 2, targets: ['*.query']}, train: {updates: 2}]"),
    "a language model with a tied head": (LANGUAGE, "[train: {updates: 2, batch_size: 4}]"),
    "a language model in 4 bits": (
        LANGUAGE, "[prune: {ratio: 0.5, what: [ffn], round_to: 32}, train: {updates: 1}, int4: {embeddings: int4}]",
    ),
    "a language model behind a prompt": (
        LANGUAGE, "[prompt: {kind: prefix, tokens: 2}, train: {updates: 2, batch_size: 4}, int8_dynamic]",
    ),
    "a language model that was rotated": (LANGUAGE, "[train: {updates: 1}, rotate, int4: {int8_linears: [lm_head]}]"),
    "a graph": (IMAGES, "[train: {updates: 2, batch_size: 4}, int8]"),
    "a graph of two inputs": (TEXT, "[train: {updates: 1}, int8]"),
}  # fmt: skip
NET = """
import torch
from torch import nn

def build(classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, len(classes)))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    save_bert(tmp_path / "encoder", "Model", **sizes)
    save_rows(tmp_path / "rows.csv")
    return tmp_path


def finished(place: Path, name: str) -> tuple[Fold, Path]:
    head, steps = RUNS[name]
    if "writer" in head:
        save_llama(place / "writer", tie_word_embeddings=True)
    if "net.py" in head:
        (place / "net.py").write_text(NET, encoding="utf-8")
        save_images(place / "images")
    (place / "r.yaml").write_text(f"{head}\nsteps: {steps}", encoding="utf-8")
    return run_of(load(place / "r.yaml"), place / "run")


def run_of(recipe: Recipe, folder: Path) -> tuple[Fold, Path]:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    fold = Fold(recipe, folder, resume=False, progress=lambda *_: None)
    fold.run()
    return fold, folder


def outputs(model: nn.Module, fold: Fold) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(
            [
                logits_of(call(model, fold.test_split.one_row(n, fold.recipe.model.max_length))).flatten()
                for n in range(4)
            ]
        )


@pytest.mark.parametrize("name", RUNS)
def test_an_opened_run_is_the_model_that_it_ended_with(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fold, folder = finished(place, name)
    shutil.rmtree(folder / "checkpoints")
    for kind in {type(step.settings) for step in fold.recipe.steps if isinstance(step.settings, Technique)}:
        monkeypatch.delattr(kind, "apply")  # nothing is applied again
    opened = open_run(folder)
    assert outputs(opened.model, fold).equal(outputs(fold.model, fold))
    assert parameter_count(opened.model) == parameter_count(fold.model)
    assert stored_bytes(opened.model) == stored_bytes(fold.model)
    assert [technique.name for technique in opened.history] == [
        step.name for step in fold.recipe.steps if isinstance(step.settings, Technique)
    ]
    assert opened.ledger == fold.ledger
    if not opened.structure.graph:
        config = getattr(fold.model, "config", None)
        assert config is None or opened.model.config.to_dict() == config.to_dict()  # type: ignore[union-attr, operator]


@pytest.mark.slow
@pytest.mark.parametrize("name", packaged_recipes())
def test_golden_recipes_open_as_they_ended(name: str, tmp_path: Path) -> None:
    recipe = load(name, {"variant": "smoke"})
    if ":" in recipe.data.source:
        pytest.skip("it needs rows of the user's own")
    fold, folder = run_of(recipe, tmp_path / "run")
    began = time.perf_counter()
    opened = open_run(folder)
    print(f"{name}: opened in {time.perf_counter() - began:.1f} s")
    assert outputs(opened.model, fold).equal(outputs(fold.model, fold))


def test_it_opens_without_its_data_and_exports_with_it(place: Path) -> None:
    fold, folder = finished(place, "a graph")
    expected = outputs(fold.model, fold)
    (place / "images").rename(place / "gone")
    opened = et.open_run(folder)
    with pytest.raises(et.EdgetuneError, match="images"):
        opened.exportable()
    (place / "gone").rename(place / "images")
    assert outputs(opened.model, fold).equal(expected)
    assert len(opened.exportable().check_inputs or ()) == len(fold.test_split)


def test_a_run_exported_again_makes_a_program_that_predicts(place: Path) -> None:
    fold, folder = finished(place, "adapted")
    again = export_from(str(folder), place / "again.pte")
    assert again.manifest.main.parity.rows == len(fold.test_split)
    (answer,) = et.predict(again.path, ["a good text"])
    assert answer.label in fold.task.labels  # type: ignore[union-attr]
    text = (place / "rows.csv").read_text(encoding="utf-8")
    (place / "rows.csv").write_text(text.replace(",1", ",one"), encoding="utf-8")
    with pytest.raises(et.EdgetuneError, match="other classes than the run learned"):
        open_run(folder).exportable()


def test_a_language_model_is_exported_again_with_another_cache(place: Path) -> None:
    _, folder = finished(place, "a language model with a tied head")
    again = export_from(str(folder), place / "again.pte", language=True, max_tokens=16)
    assert again.language.max_tokens == 16
    assert "perplexity" in (place / "again.md").read_text(encoding="utf-8"), "its card tells of the run"


def test_what_is_no_finished_run_says_what_to_do(place: Path) -> None:
    with pytest.raises(et.EdgetuneError, match="does not contain a finished run"):
        open_run(place)
    _, folder = finished(place, "adapted")
    structure = folder / "finished" / "structure.json"
    text = structure.read_text(encoding="utf-8")
    structure.write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(et.EdgetuneError, match="damaged, or of another version"):
        open_run(folder)
    plain = json.loads(text)
    structure.write_text(json.dumps({**plain, "values": {"labels": ["one", "two", "three"]}}), encoding="utf-8")
    with pytest.raises(et.EdgetuneError, match="does not fit the recipe's model"):
        open_run(folder)
    shutil.rmtree(folder / "finished")
    with pytest.raises(et.EdgetuneError, match="the run has no stored model") as error:
        open_run(folder)
    assert "--resume --from export" in str(error.value)
