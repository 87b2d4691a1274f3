"""Numbers and entities from a table to a program's answers, and what of them is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from edgetune.core import registry
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.data.dataset import Dataset
from edgetune.data.rows import Rows
from edgetune.data.settings import DataSettings
from edgetune.program.carried import ScaledValue, TaggedWords
from edgetune.recipe.new_recipe import new_recipe
from edgetune.run.predicting import PredictedEntities, PredictedNumber
from edgetune.tasks.regression import Regression
from edgetune.tasks.token_classification import TokenClassification
from support.checkpoints import WORDS, save_tokenizer


def numbers_table(path: Path) -> None:
    moods = (("bad", 0.25), ("good", 4.25))
    rows = [f"{moods[n % 2][0]} text {'a ' * (n % 9)}{'very ' * (n % 5)},{moods[n % 2][1]}" for n in range(90)]
    path.write_text("\n".join(["text,stars", *rows]), encoding="utf-8")


def tagged_file(path: Path) -> None:
    """`good` and `bad` are moods, and so is `bad text`."""
    starts = [["good B-mood", "a O"], ["bad B-mood", "text I-mood"], ["a O", "very O"]]
    texts = [[*starts[n % 3], *["very O"] * (n % 7), *["a O"] * (n % 5)] for n in range(120)]
    path.write_text("-DOCSTART- O\n\n" + "\n\n".join("\n".join(text) for text in texts) + "\n", encoding="utf-8")


def recipe(data: str, path: Path) -> None:
    path.write_text(
        f"model: {{source: 'hf:encoder', max_length: 16}}\ndata: {data}\n"
        "steps: [train: {updates: 60, batch_size: 16, learning_rate: 3e-3, keep_best: true}, int4]\n"
        "export: {check_rows: 8}\n",
        encoding="utf-8",
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a BERT that learns fast."""
    import transformers

    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path / "encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path / "encoder")
    return tmp_path


def test_numbers_from_a_table_to_a_prediction(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import edgetune as et
    from edgetune.cli.main import main

    numbers_table(here / "rows.csv")
    recipe("{source: 'csv:rows.csv', target: stars}", here / "r.yaml")
    run = et.run("r.yaml", out="runs/one")
    ledger = run.ledger
    assert ledger.rows[-1].quality is not None
    assert (ledger.rows[-1].quality.metric, ledger.answers) == ("rmse", None)
    assert ledger.rows[-1].quality.value < ledger.baselines[0].value
    carried = json.loads((here / "runs/one/model.json").read_text(encoding="utf-8"))["carried"]
    told = ScaledValue.model_validate(carried["postprocessing"])
    assert told.mean == pytest.approx(2.25, abs=0.3)
    assert carried["labels"] == []
    assert ledger.program is not None
    assert ledger.program.parity is not None
    assert ledger.program.parity.same_prediction_pct == 100

    answers = et.predict("runs/one", ["bad text a", "good text a"])
    few, many = (answer for answer in answers if isinstance(answer, PredictedNumber))
    assert few.value < many.value
    measured = et.evaluate("runs/one")
    assert measured.quality.value == pytest.approx(ledger.rows[-1].quality.value, abs=0.05)
    capsys.readouterr()
    assert main(["predict", "runs/one", "good text"]) == 0
    assert math.isfinite(float(capsys.readouterr().out.strip().removeprefix("good text: ")))
    assert main(["eval", "runs/one", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rmse"] == pytest.approx(measured.quality.value)
    assert main(["report", "runs/one"]) == 0
    assert "RMSE" in capsys.readouterr().out
    assert main(["kit", "runs/one/model.pte", "linux", "-o", "kit"]) == Exit.EXPORT
    assert "the samples of a kit show classes" in capsys.readouterr().err


def test_entities_from_a_file_to_a_prediction(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import edgetune as et
    from edgetune.cli.main import main

    tagged_file(here / "rows.conll")
    recipe("conll:rows.conll", here / "r.yaml")
    ledger = et.run("r.yaml", out="runs/one").ledger
    assert ledger.rows[-1].quality is not None
    assert ledger.rows[-1].quality.metric == "entity_f1_pct"
    assert ledger.rows[-1].quality.value > 90
    carried = json.loads((here / "runs/one/model.json").read_text(encoding="utf-8"))["carried"]
    assert TaggedWords.model_validate(carried["postprocessing"]).scheme == "IOB2"
    assert carried["labels"] == ["O", "B-mood", "I-mood"]

    text = "bad  text very, a"
    (answer,) = et.predict("runs/one", text)
    assert isinstance(answer, PredictedEntities)
    assert all(text[one.start : one.end] == one.text for one in answer.entities)
    assert ("bad  text", "mood") in [(one.text, one.kind) for one in answer.entities]
    measured = et.evaluate("runs/one")
    assert measured.quality.value == pytest.approx(ledger.rows[-1].quality.value, abs=5)
    capsys.readouterr()
    assert main(["predict", "runs/one", text]) == 0
    assert "bad text (mood, 0-9)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "1 tags for 2 words"),
        ({"tokens": ["a", "b"], "tags": ["O", "PER"]}, "'PER' is no tag of the form O, B-kind or I-kind"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, "a word is empty"),
        ({"tokens": [], "tags": []}, "no words"),
        ({"tokens": ["a"], "tags": 1}, "the tags are int, not a list"),
        ({"tokens": ["a"]}, "no column for the tags"),
    ],
)
def test_tagged_rows_that_do_not_fit_are_refused(rows: dict[str, Any], says: str, tmp_path: Path) -> None:
    content = "\n".join(json.dumps({**rows, "id": n}) for n in range(40))
    (tmp_path / "rows.jsonl").write_text(content, encoding="utf-8")
    settings = DataSettings.model_validate({"source": f"jsonl:{tmp_path / 'rows.jsonl'}", "tags": "tags"})
    with pytest.raises(EdgetuneError, match=says) as caught:
        registry.loader(registry.DATASETS, "data", settings.source)(settings)
    assert caught.value.exit_code == Exit.DATA


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["many"] * 40, "the target is not a number: many"),
        (["nan"] * 40, "the number is missing: nan"),
        (["inf"] * 40, "the target is not a number: inf"),
        (["3,5"] * 40, "the target is not a number: 3,5"),
        (["1.5"] * 40, "every training row has the same number"),
    ],
)
def test_numbers_that_cannot_be_learned_are_refused(values: list[str], says: str, tmp_path: Path) -> None:
    rows = "\n".join(["text;price", *(f"text {n};{value}" for n, value in enumerate(values))])
    (tmp_path / "rows.csv").write_text(rows, encoding="utf-8")
    settings = DataSettings.model_validate({"source": f"csv:{tmp_path / 'rows.csv'}", "target": "price"})
    with pytest.raises(EdgetuneError, match=says) as caught:
        registry.loader(registry.DATASETS, "data", settings.source)(settings)
    assert caught.value.exit_code == Exit.DATA


def test_settings_of_two_tasks_do_not_go_together() -> None:
    for changes, reason in (
        ({"target": "a", "tags": "b"}, "target and tags are for different tasks"),
        ({"target": "a", "label": "b"}, "label and target are for different tasks"),
        ({"source": "conll:x", "text": "words"}, "conll does not read text"),
        ({"tags": "t", "text": ["a", "b"]}, "tags need one column of words"),
    ):
        with pytest.raises(ValueError, match=reason):
            DataSettings.model_validate({"source": "csv:x", **changes})


def test_standard_values_come_from_the_training_rows_alone() -> None:
    train, test = Rows(["a"] * 4, [0.0, 2.0, 4.0, 6.0]), Rows(["b"], [1e6])
    task = Regression().fit(train)
    assert (task.mean, task.std) == (3.0, pytest.approx(math.sqrt(5)))
    _, labels = task.collate({}, test.labels_at([0]))
    assert labels.item() == pytest.approx((1e6 - 3) / math.sqrt(5))


def test_a_new_recipe_sees_numbers_and_tags(here: Path) -> None:
    numbers_table(here / "rows.csv")
    assert '"text": ' not in (text := new_recipe(here / "n.yaml", "hf:encoder", "csv:rows.csv"))
    assert 'target: "stars"}  # ' in text
    rows = [{"tokens": ["in", f"Rome {n}"], "ner_tags": ["O", "B-place"]} for n in range(40)]
    (here / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text = new_recipe(here / "n.yaml", "hf:encoder", "jsonl:rows.jsonl")
    assert 'text: "tokens", tags: "ner_tags"}  # ' in text


def test_a_function_may_return_numbers_or_tagged_words(here: Path) -> None:
    (here / "own.py").write_text(
        "def numbers():\n    return [(f'text {n}', n / 4) for n in range(40)]\n"
        "def tagged():\n    return [(['in', f'place{n}'], ['O', 'B-place']) for n in range(40)]\n"
        "def mixed():\n    return [('a', 1.5), ('b', 'good')] * 20\n",
        encoding="utf-8",
    )

    def loaded(name: str) -> Dataset:
        source = f"py:own.py:{name}"
        read: Dataset = registry.loader(registry.DATASETS, "data", source)(DataSettings(source=source))
        return read

    assert isinstance(loaded("numbers").task, Regression)
    assert loaded("tagged").task == TokenClassification(("O", "B-place"))
    with pytest.raises(EdgetuneError, match="return a float for every row"):
        loaded("mixed")


def test_class_weights_of_numbers_are_refused_before_any_work(here: Path) -> None:
    import edgetune as et

    numbers_table(here / "rows.csv")
    recipe("{source: 'csv:rows.csv', target: stars}", here / "r.yaml")
    with pytest.raises(EdgetuneError, match="class_weights needs classes, and regression has none"):
        et.run("r.yaml", {"train.class_weights": "balanced"}, out="runs/one")
    assert not list((here / "runs").rglob("checkpoints"))
