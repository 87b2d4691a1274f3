"""What a checkpoint knows of its classes stays: their order, their names, and its trained head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from edgetune.core.errors import EdgetuneError
from edgetune.data.dataset import Dataset, Split
from edgetune.data.rows import Rows
from edgetune.models.metadata import describe_io
from edgetune.models.text import TextEncoder, hugging_face
from edgetune.recipe.recipe import load
from edgetune.run import exporting
from edgetune.run.fold import Fold
from edgetune.tasks.quality import quality
from edgetune.tasks.text_classification import TextClassification
from support.checkpoints import WORDS, save_bert, save_tokenizer
from support.datasets import model_settings, tiny_dataset

MOODS = {
    "num_labels": 3,
    "id2label": {0: "neutral", 1: "bad", 2: "good"},
    "label2id": {"neutral": 0, "bad": 1, "good": 2},
}


SORTED = ("Bad", "Good", "Neutral")  # as a table gives them


def answered_by(model: Any, encode: Any, classes: tuple[str, ...]) -> Dataset:
    """Rows whose labels are the model's own answers, by name: whoever keeps the names right is right every time.

    Its bias is set so that it gives every answer.
    """
    texts = [" ".join(words) for words in ("good bad", "bad bad a", "very good", "text", "a a a", "bad very", "good")]
    with torch.no_grad():
        model.classifier.bias -= model(**encode(texts)).logits.mean(0)
        answers = model(**encode(texts)).logits.argmax(-1).tolist()
    names = [model.config.id2label[answer].capitalize() for answer in answers]
    rows = Rows(texts, [classes.index(name) for name in names])
    assert len(set(names)) == 3
    return Dataset("moods", TextClassification(classes), rows, rows, rows)


def test_a_checkpoint_keeps_the_order_of_its_classes_whatever_the_datas_is(tmp_path: Path) -> None:
    model = save_bert(tmp_path, **MOODS)
    encode = TextEncoder(save_tokenizer(tmp_path / "words"), 16)
    rows = answered_by(model, encode, SORTED)
    model.save_pretrained(tmp_path)
    loaded = hugging_face(str(tmp_path), model_settings(max_length=16), rows)
    labelled = loaded.relabel(rows)
    assert labelled.classes == describe_io(loaded, rows).labels == ("neutral", "bad", "good")
    assert loaded.relabel(labelled) is labelled
    assert loaded.notes == ()
    assert loaded.model.config.id2label == MOODS["id2label"]
    assert torch.equal(loaded.model.classifier.weight, model.classifier.weight)
    assert [SORTED[label].lower() for label in rows.test.labels or ()] == [
        labelled.classes[label] for label in labelled.test.labels or ()
    ]
    split = Split(labelled.task, labelled.test, loaded.encode)
    assert quality(loaded.model, split).value == 100


@pytest.fixture(scope="module")
def moods(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and a table labelled by its own answers."""
    folder = tmp_path_factory.mktemp("moods")
    model = save_bert(folder / "model", **MOODS, max_position_embeddings=64)
    encode = TextEncoder(save_tokenizer(folder / "model"), 64)
    texts = [f"{a} {b} {c} {d}" for a in WORDS[5:] for b in WORDS[5:] for c in WORDS[5:] for d in ("good", "bad")]
    with torch.no_grad():
        model.classifier.bias -= model(**encode(texts)).logits.mean(0)
        answers = model(**encode(texts)).logits.argmax(-1).tolist()
    model.save_pretrained(folder / "model")
    lines = [f"{text},{model.config.id2label[answer].upper()}" for text, answer in zip(texts, answers, strict=True)]
    assert len(set(answers)) == 3
    (folder / "rows.csv").write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    return folder / "model", folder / "rows.csv"


def test_an_exported_checkpoint_carries_its_own_classes(moods: tuple[Path, Path]) -> None:
    exportable = exporting.load_exportable(f"hf:{moods[0]}", f"csv:{moods[1]}")
    assert exportable.carried is not None
    assert exportable.carried.labels == ("neutral", "bad", "good")


def test_a_run_begins_with_what_the_checkpoint_knows(moods: tuple[Path, Path], tmp_path: Path) -> None:
    text = f"name: moods\nmodel: {{source: 'hf:{moods[0]}'}}\ndata: {{source: 'csv:{moods[1]}'}}\nsteps: [eval]\n"
    (tmp_path / "moods.yaml").write_text(text, encoding="utf-8")
    fold = Fold(load(tmp_path / "moods.yaml"), tmp_path, resume=False, progress=lambda *_: None)
    fold.steps()
    loaded = fold.ledger.rows[0]
    assert loaded.quality is not None
    assert loaded.quality.value == 100, "the table's labels are its own answers"
    assert fold.carried.labels == ("neutral", "bad", "good")


REFUSED_HEADS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...], str]] = {
    "other names": (MOODS, {}, ("bad", "good", "fine"), r"other classes than the data: neutral, bad, good"),
    "other names, kept": (MOODS, {"head": "keep"}, ("bad", "good", "fine"), "other classes than the data"),
    "another number": (MOODS, {}, ("bad", "good"), r"3 classes \(neutral, bad, good\), the data 2"),
    "no names": ({"num_labels": 3}, {}, SORTED, "does not name its classes"),
    "a score": ({"num_labels": 1}, {}, SORTED, r"has 1 classes \(LABEL_0\), the data 3"),
    "several at once": (
        {**MOODS, "problem_type": "multi_label_classification"}, {}, SORTED, "does not predict exactly one class",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_HEADS)
def test_a_trained_head_of_other_classes_is_refused_unless_a_new_one_is_asked_for(case: str, tmp_path: Path) -> None:
    checkpoint, changes, classes, message = REFUSED_HEADS[case]
    trained = save_bert(tmp_path, **checkpoint).state_dict()
    with pytest.raises(EdgetuneError, match=message) as caught:
        hugging_face(str(tmp_path), model_settings(max_length=16, **changes), tiny_dataset(classes=classes))
    assert "head: new" in caught.value.action
    loaded = hugging_face(str(tmp_path), model_settings(max_length=16, head="new"), tiny_dataset(classes=classes))
    assert loaded.classes is None
    assert loaded.model.config.id2label == dict(enumerate(classes))
    assert "classifier.weight" in loaded.notes[0]
    drawn = loaded.model.state_dict()
    assert torch.equal(drawn["bert.pooler.dense.weight"], trained["bert.pooler.dense.weight"])
    assert drawn["classifier.weight"].abs().max() < 0.2, "drawn anew: the trained one's values are larger"


def test_outputs_without_names_are_the_datas_classes_in_order_where_the_user_says_so(tmp_path: Path) -> None:
    trained = save_bert(tmp_path, num_labels=3)
    loaded = hugging_face(str(tmp_path), model_settings(max_length=16, head="keep"), tiny_dataset(classes=SORTED))
    assert torch.equal(loaded.model.classifier.weight, trained.classifier.weight)
    assert loaded.relabel(tiny_dataset(classes=SORTED)).classes == SORTED
    assert "assumed to be Bad, Good, Neutral" in loaded.notes[0]


@pytest.mark.parametrize("kind", ["Model", "MaskedLM", "TokenClassification"])
def test_a_checkpoint_without_a_head_for_texts_gets_a_new_one(kind: str, tmp_path: Path) -> None:
    save_bert(tmp_path, kind, num_labels=3)
    loaded = hugging_face(str(tmp_path), model_settings(max_length=16), tiny_dataset())
    assert loaded.model.classifier.weight.abs().max() < 0.2  # type: ignore[union-attr, operator]
    assert loaded.classes is None
    assert "classifier.weight" in " ".join(loaded.notes)
    with pytest.raises(EdgetuneError, match="no trained text-classification head to keep"):
        hugging_face(str(tmp_path), model_settings(max_length=16, head="keep"), tiny_dataset())


def test_a_checkpoint_that_does_not_say_what_it_is_has_a_head_if_its_file_holds_one(tmp_path: Path) -> None:
    trained = save_bert(tmp_path, **MOODS)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": None}))
    loaded = hugging_face(str(tmp_path), model_settings(max_length=16), tiny_dataset(classes=SORTED))
    assert loaded.relabel(tiny_dataset(classes=SORTED)).classes == ("neutral", "bad", "good")
    assert torch.equal(loaded.model.classifier.weight, trained.classifier.weight)
    with pytest.raises(EdgetuneError, match="the data 2"):
        hugging_face(str(tmp_path), model_settings(max_length=16), tiny_dataset(classes=SORTED[:2]))
