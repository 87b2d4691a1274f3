"""Laws of tasks, each crossed with the table of them; entities counted by hand; both new tasks from data to answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgetune.core import registry
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.ledger import METRICS
from edgetune.data.dataset import Dataset, Split
from edgetune.data.rows import IGNORED_LABEL, Rows
from edgetune.data.settings import DataSettings
from edgetune.models.labels import output_names
from edgetune.models.loaded import ModelSettings
from edgetune.models.text import hugging_face
from edgetune.program.carried import ScaledValue, TaggedWords
from edgetune.recipe.new_recipe import new_recipe
from edgetune.run.predicting import PredictedEntities, PredictedNumber
from edgetune.tasks.entities import entities, entity_f1_pct
from edgetune.tasks.quality import quality
from edgetune.tasks.regression import Regression
from edgetune.tasks.task import Batch, Task
from edgetune.tasks.token_classification import TokenClassification
from edgetune.train.loop import count_labels, soft_loss
from support.checkpoints import WORDS, save_bert, save_tokenizer

TAGS = ("O", "B-place", "I-place")
NUMBERS = [1.0, 2.5, -3.0, 8.0, 0.5, 4.0, 9.5, -1.0]
PLACES = [(0, 1, 2), (1, 0, 0), (0, 0, 0), (1, 2, 2), (0, 1, 0), (1, 1, 0), (0, 1, 2), (1, 2, 0)]


def words(inputs: Any, pad_to: int | None = None) -> Any:
    """Three tokens for each row, the numbers of its words; five places, of which two are padding."""
    if hasattr(inputs, "dtype"):
        return torch.from_numpy(np.asarray(inputs)).float()
    split = [row.split() if isinstance(row, str) else row for row in inputs]
    ids = torch.tensor([[len(word) for word in row] + [0, 0] for row in split])
    tensors = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    if not isinstance(inputs[0], str):
        tensors["words"] = torch.tensor([[0, 1, 2, -1, -1]] * len(split))
    return tensors


def dataset(name: str) -> Dataset:
    """Eight rows for any task of the table."""
    kind: type[Task] = registry.load(registry.TASKS[name])
    texts: Any = [f"{'a' * (1 + n % 4)} {'b' * (1 + n % 3)} {'c' * (1 + n % 2)}" for n in range(8)]
    if name == "image-classification":
        texts = np.random.default_rng(0).integers(0, 256, (8, 6, 6), dtype=np.uint8)
    if name == "token-classification":
        texts = [tuple(text.split()) for text in texts]
    labels = {"causal-lm": None, "regression": NUMBERS, "token-classification": PLACES}.get(name, [0, 1, 2, 0] * 2)
    names = {"causal-lm": (), "regression": (), "token-classification": TAGS}.get(name, ("x", "y", "z"))
    rows = Rows(texts, labels)
    task = kind(names)
    task.check("tiny", rows, (rows, rows))
    return Dataset("tiny", task.fit(rows), rows, rows, rows)


def split_of(data: Dataset) -> Split:
    return Split(data.task, data.test, words)


def perfect(labels: Tensor, classes: int) -> Tensor:
    """Logits that are right about every label that counts."""
    if labels.is_floating_point():
        return labels[:, None].clone()
    return 50.0 * torch.nn.functional.one_hot(labels.clamp(min=0), classes).float()


def outputs(data: Dataset) -> int:
    return 8 if data.task.name == "causal-lm" else data.task.outputs


each = pytest.mark.parametrize("name", registry.TASKS)


@each
def test_the_loss_is_finite_has_a_gradient_and_is_least_where_all_is_right(name: str) -> None:
    data = dataset(name)
    _, labels = split_of(data).batch(range(8))
    right = perfect(labels, outputs(data))
    guess = torch.randn(right.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = data.task.loss(guess, labels)
    loss.backward()
    assert loss.dim() == 0
    assert guess.grad is not None
    assert bool(guess.grad.isfinite().all())
    assert float(guess.grad.abs().max()) > 0
    assert 0 <= float(data.task.loss(right, labels)) < 1e-6 < loss.item()
    # two halves weigh as their labels do: so an update may be cut into batches of any size
    halves = [(guess.detach()[half], labels[half]) for half in (slice(3), slice(3, 8))]
    together = sum(count_labels(some) * data.task.loss(of, some).item() for of, some in halves) / count_labels(labels)
    assert together == pytest.approx(loss.item(), rel=1e-5)


@each
def test_quality_of_right_answers_is_the_best_there_is_and_above_the_baselines(name: str) -> None:
    data = dataset(name)
    split = split_of(data)
    halves = [range(5, 8), range(5)]  # in any order

    def batches(noise: float) -> Any:
        for indices in halves:
            inputs = split.encode_rows(indices)
            _, labels = split.task.collate(inputs, split.rows.labels_at(indices))
            logits = perfect(labels, outputs(data))
            yield Batch(indices, inputs, logits + noise * torch.randn(logits.shape), labels)

    best, worse = data.task.quality(batches(0), data.test), data.task.quality(batches(1e3), data.test)
    rising = METRICS[best.metric].higher_is_better
    assert best.value == pytest.approx({"perplexity": 1.0, "rmse": 0.0}.get(best.metric, 100.0), abs=1e-6)
    assert best.rows == 8
    assert (worse.value < best.value) == rising
    for baseline in data.task.baselines(data.parts, words):
        assert (baseline.value < best.value) == rising or baseline.value == best.value


@each
def test_names_of_labels_go_with_them_into_another_order(name: str) -> None:
    data = dataset(name)
    turned = data.with_classes({label: label for label in reversed(data.classes)})
    assert turned.classes == tuple(reversed(data.classes))
    if not data.classes:
        assert turned is data
        return

    def by_name(of: Dataset) -> list[Any]:
        named = ([*label] if isinstance(label, tuple) else [label] for label in of.test.labels or ())
        return [[of.classes[number] for number in numbers] for numbers in named]

    assert by_name(turned) == by_name(data)
    assert turned.fingerprint != data.fingerprint


@each
def test_class_weights_are_for_classes(name: str) -> None:
    data = dataset(name)
    if not data.classes:
        with pytest.raises(EdgetuneError, match=f"class_weights needs classes, and {name} has none"):
            data.task.class_weights(data.train)
        return
    _, labels = split_of(data).batch(range(8))
    weights = data.task.class_weights(data.train)
    assert weights.shape == (len(data.classes),)
    logits = torch.zeros(*labels.shape, len(data.classes), requires_grad=True)
    data.task.loss(logits, labels, weights).backward()
    assert logits.grad is not None
    pulls = logits.grad.flatten(0, -2).sum(0)
    torch.testing.assert_close(pulls, torch.zeros_like(pulls), msg="every class pulls alike")


@each
def test_a_teacher_that_says_the_same_teaches_nothing(name: str) -> None:
    data = dataset(name)
    _, labels = split_of(data).batch(range(8))
    logits = perfect(labels, outputs(data))
    assert soft_loss(logits, logits.clone(), labels, 2.0).item() == pytest.approx(0, abs=1e-6)
    assert soft_loss(logits, -logits, labels, 2.0).item() > 0.1


# Entities


def test_entities_are_counted_as_seqeval_does() -> None:
    """The numbers of seqeval 1.2.2 for the same tags, in its default mode."""
    true = [["O", "O", "B-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    assert entity_f1_pct(true, [["O", "O", "B-MISC", "I-MISC", "I-MISC"], ["B-PER", "I-PER", "O"]]) == 50.0
    assert entity_f1_pct(true, true) == 100.0
    assert entity_f1_pct([["O", "O"]], [["O", "O"]]) == 0.0
    # one of two found, and one that is none: precision 1/2, recall 1/2
    assert entity_f1_pct([["B-A", "O", "B-A"]], [["B-A", "B-B", "O"]]) == 50.0
    # three predicted of which one is right, one true: 2 * 1 / (3 + 1)
    assert entity_f1_pct([["B-A", "I-A", "O", "O"]], [["B-A", "I-A", "B-A", "B-B"]]) == 50.0
    # an I- that stands alone begins an entity; a change of kind ends one
    assert [tuple(one) for one in entities(["I-A", "I-A", "I-B", "O", "B-B", "B-B"])] == [
        ("A", 0, 2), ("B", 2, 3), ("B", 4, 5), ("B", 5, 6),
    ]  # fmt: skip


def test_only_the_first_token_of_a_word_has_its_tag(tmp_path: Path) -> None:
    save_bert(tmp_path, "Model", hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
    rows = Rows([("goodness", "a", "badly")], [(1, 0, 2)])
    data = Dataset("tiny", TokenClassification(TAGS), rows, rows, rows)
    loaded = hugging_face(str(tmp_path), ModelSettings(source="x", max_length=12), data)
    split = Split(data.task, rows, loaded.encode)
    inputs, labels = split.batch([0], pad_to=12)
    assert isinstance(inputs, dict)
    assert set(inputs) == {"input_ids", "attention_mask"}
    begins = loaded.encode([rows.inputs[0]], 12)["words"][0]  # type: ignore[call-overload, index]
    assert labels[0][begins >= 0].tolist() == [1, 0, 2]
    assert set(labels[0][begins < 0].tolist()) == {IGNORED_LABEL}
    assert output_names(loaded.model.config) == TAGS
    # what is cut off counts as missed: of the second entity, nothing is seen
    short = hugging_face(str(tmp_path), ModelSettings(source="x", max_length=8), data)
    long = Rows([(*("a",) * 20, "bad")], [(1, *(0,) * 19, 1)])

    class Right(torch.nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            tags = torch.zeros_like(input_ids)
            tags[:, 1] = 1
            return perfect(tags, 3)

    assert quality(Right(), Split(data.task, long, short.encode)).value == pytest.approx(100 * 2 / 3)


# From the table to the answer


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


def test_a_trained_head_for_numbers_is_not_taken_over(tmp_path: Path) -> None:
    save_bert(tmp_path, num_labels=1, problem_type="regression")
    data = dataset("regression")
    with pytest.raises(EdgetuneError, match="numbers of another scale, so it cannot be kept"):
        hugging_face(str(tmp_path), ModelSettings(source="x", max_length=8, head="keep"), data)
    loaded = hugging_face(str(tmp_path), ModelSettings(source="x", max_length=8), data)
    assert any("new weights instead of those of the checkpoint: classifier" in note for note in loaded.notes)


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
