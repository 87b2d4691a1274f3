"""Tables as people have them: texts in several columns, labels under other names, odd labels, a test file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.data.augment import Augmented
from edgetune.data.dataset import Dataset
from edgetune.data.own import own_splits
from edgetune.data.rows import Rows
from edgetune.data.settings import DataSettings
from edgetune.data.tables import from_csv, from_jsonl
from edgetune.tasks.causal_lm import CausalLM
from edgetune.tasks.text_classification import TextClassification


def table(folder: Path, labels: list[str], name: str = "rows.csv") -> Path:
    lines = ["text,label", *(f"text number {n},{label}" for n, label in enumerate(labels))]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return folder / name


def read(path: Path, **changes: Any) -> Dataset:
    return from_csv(str(path), DataSettings(source=f"csv:{path}", **changes))


def test_ordinary_labels_are_not_noted(tmp_path: Path) -> None:
    assert read(table(tmp_path, ["1", "2", "3"] * 20)).notes == ()
    assert len(read(table(tmp_path, [f"class {n % 30}" for n in range(120)])).classes) == 30


def test_a_text_in_several_columns(tmp_path: Path) -> None:
    lines = ["title,body,label", *(f"Title {n},Body {n},{'ab'[n % 2]}" for n in range(40)), "Alone,,a"]
    (tmp_path / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    data = read(tmp_path / "rows.csv", text=["title", "body"])
    texts = {text for part in (data.train, data.validation, data.test) for text in part.inputs}
    assert {"Title 3\nBody 3", "Alone"} <= texts
    with pytest.raises(EdgetuneError, match="no column for the text: got 'lead'"):
        read(tmp_path / "rows.csv", text=["title", "lead"])


def test_labels_under_other_names(tmp_path: Path) -> None:
    path = table(tmp_path, ["0", "1", "2"] * 20)
    data = read(path, label_names={"0": "bad", "1": "good", "2": "good"})
    assert data.classes == ("bad", "good")
    with pytest.raises(EdgetuneError, match="label_names lacks a label of the table: got '2'"):
        read(path, label_names={"0": "bad", "1": "good"})
    named = read(table(tmp_path, ["nan", "good"] * 20), label_names={"nan": "an Indian bread", "good": "good"})
    assert named.classes == ("an Indian bread", "good")


def test_a_test_file_beside_the_training_rows(tmp_path: Path) -> None:
    rows, held_out = table(tmp_path, ["a", "b"] * 30), table(tmp_path, ["a", "b", "b"], "test.csv")
    data = read(rows, test_file=str(held_out))
    assert (len(data.test), data.test.labels) == (3, [0, 1, 1])
    assert len(data.train) + len(data.validation) == 60
    assert "3 test texts are also among the training rows" in data.notes
    (tmp_path / "rows.jsonl").write_text('{"text": "a b", "label": "a"}\n' * 3, encoding="utf-8")
    with pytest.raises(EdgetuneError, match=r"nothere.jsonl does not exist"):
        from_jsonl(str(tmp_path / "rows.jsonl"), DataSettings(source="x", test_file=str(tmp_path / "nothere.jsonl")))


def test_balanced_class_weights_count_every_class_alike() -> None:
    rows = Rows(["a"] * 8, [0, 0, 0, 0, 0, 0, 1, 1])
    data = Dataset("d", TextClassification(("x", "y")), rows, rows, rows)
    weights = data.task.class_weights(data.train)
    torch.testing.assert_close(weights, torch.tensor([8 / 12, 2.0]))
    logits, labels = torch.zeros(8, 2, requires_grad=True), torch.tensor(rows.labels)
    data.task.loss(logits, labels, weights).backward()
    torch.testing.assert_close(logits.grad.sum(0), torch.zeros(2), msg="both classes pull alike")
    with pytest.raises(EdgetuneError, match="class_weights needs classes, and causal-lm has none"):
        CausalLM().class_weights(data.train)


def plain(inputs: Any, pad_to: int | None = None) -> torch.Tensor:
    return torch.stack([torch.from_numpy(picture).float() for picture in inputs])


def test_pictures_are_changed_each_by_itself_and_anew() -> None:
    row = np.linspace(0, 255, 16, dtype=np.float32)
    pictures = [np.broadcast_to(row, (3, 16, 16)).copy() for _ in range(64)]
    torch.manual_seed(0)
    mirrored = Augmented(plain, ("flip",))(pictures)
    turned = (mirrored[:, 0, 0, 0] > mirrored[:, 0, 0, -1]).sum()
    assert 16 < turned < 48
    assert torch.equal(mirrored.sort(3).values, plain(pictures)), "mirrored, and nothing else"
    cropped = Augmented(plain, ("crop",))(pictures)
    assert cropped.shape == (64, 3, 16, 16)
    assert len({tuple(picture[0, 0].tolist()) for picture in cropped}) == 5, "two columns to either side"
    coloured = Augmented(plain, ("colour",))(pictures)
    assert coloured.mean((1, 2, 3)).std() > 1
    assert not torch.equal(coloured, Augmented(plain, ("colour",))(pictures))


OWN = """
def rows():
    return [("text %d" % n, "ab"[n % 2]) for n in range(40)]
def parts():
    return {"train": rows(), "test": [("another", "a"), ("one more", "b")]}
def mixed():
    return [("text", "a"), ("text",)]
def pictures():
    import numpy
    return [(numpy.zeros((4, 4 + n % 2), dtype="uint8"), n % 2) for n in range(20)]
def texts():
    return ["text %d" % n for n in range(40)]
def strange():
    return [("text", b"good")]
def misnamed():
    return {"training": rows()}
"""


def test_rows_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")

    def loaded(function: str) -> Dataset:
        return own_splits(f"{tmp_path / 'own.py'}:{function}", DataSettings(source="py"))

    assert loaded("rows").task == TextClassification(("a", "b"))
    assert sorted(loaded("parts").test.inputs) == ["another", "one more"]
    assert loaded("texts").task == CausalLM()
    for function, message in {
        "mixed": "several kinds|neither a text nor", "pictures": "several sizes",
        "strange": "neither a string",
        "misnamed": "returns no training rows",
    }.items():  # fmt: skip
        with pytest.raises(EdgetuneError, match=message) as caught:
            loaded(function)
        assert caught.value.exit_code == Exit.DATA
