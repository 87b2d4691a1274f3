"""`edgetune predict` and `edgetune eval`: a program answers raw rows, from nothing but what it carries."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgetune.cli import predict as cli_predict
from edgetune.cli.main import main
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.data.rows import Rows
from edgetune.data.settings import DataSettings, WholeData
from edgetune.data.tables import from_csv
from edgetune.export import export
from edgetune.models.loaded import LoadedModel
from edgetune.program.manifest import ProgramKind
from edgetune.run.predicting import evaluate, predict
from edgetune.run.predictor import Predictor
from edgetune.tasks.answers import count_answers
from support.manifests import stored
from support.programs import CLASSES, Small


def logits_of(loaded: LoadedModel, rows: Sequence[Any], pad_to: int | None = None) -> torch.Tensor:
    inputs: Any = loaded.encode(rows, pad_to)
    with torch.no_grad():
        answer: torch.Tensor = loaded.model(**inputs) if isinstance(inputs, dict) else loaded.model(inputs)
    return answer


def test_texts_are_answered_as_the_model_does(text_program: Small) -> None:
    loaded, dataset, artifact = text_program
    rows = [str(row) for row in dataset.test.inputs]
    predictions = predict(artifact.path, rows)
    wanted = logits_of(loaded, rows).softmax(1)
    assert [one.label for one in predictions] == [dataset.classes[place] for place in wanted.argmax(1)]
    for one, shares in zip(predictions, wanted, strict=True):
        assert list(one.scores.values()) == sorted(one.scores.values(), reverse=True)
        assert one.score == pytest.approx(float(shares.max()), abs=1e-3)
    assert predict(artifact.path, rows[0]) == predictions[:1], "one row need be no list"
    assert predict(artifact.path, []) == ()


def test_images_are_answered_as_the_model_does(picture_program: Small, tmp_path: Path) -> None:
    loaded, dataset, artifact = picture_program
    paths = list(dataset.test.inputs)
    wanted = logits_of(loaded, paths).softmax(1)
    predictions = predict(artifact.path, paths)
    assert [one.label for one in predictions] == [dataset.classes[place] for place in wanted.argmax(1)]
    assert [one.score for one in predictions] == pytest.approx(wanted.amax(1).tolist(), abs=1e-3)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    for name, what in (("broken.png", "cannot be read"), ("missing.png", "no such image")):
        with pytest.raises(EdgetuneError, match=what) as caught:
            predict(artifact.path, tmp_path / name)
        assert caught.value.exit_code == Exit.DATA


def test_the_verb_reads_files_folders_and_stdin(
    text_program: Small,
    picture_program: Small,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = str(text_program[2].path)
    (tmp_path / "rows.txt").write_text("so good\n\n  so bad \n", encoding="utf-8")
    (tmp_path / "rows.csv").write_text('text,stars\n"one, two",5\nthree,1\n', encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"said": "four"}\n', encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("five\n"))
    rows = ["a text", str(tmp_path / "rows.txt"), str(tmp_path / "rows.csv"), "-"]
    assert main(["predict", program, *rows, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert [one["row"] for one in answers] == ["a text", "so good", "so bad", "one, two", "three", "five"]
    assert [one.get("source") for one in answers] == [
        None, "rows.txt, line 1", "rows.txt, line 3", "rows.csv, row 1", "rows.csv, row 2", "stdin, line 1"
    ]  # fmt: skip
    assert main(["predict", program, str(tmp_path / "rows.jsonl"), "--column", "said", "--top", "1"]) == 0
    line = capsys.readouterr().out
    wanted = predict(program, "four")[0]
    assert line == f"rows.jsonl, row 1: four: {wanted.label} {100 * wanted.score:.1f} %\n"
    assert main(["predict", str(picture_program[2].path), str(Path(picture_program[1].test.inputs[0]).parent)]) == 0
    assert capsys.readouterr().out.count("\n") == len(picture_program[1].test.inputs)


@pytest.mark.parametrize(
    ("rows", "what", "action"),
    [
        (["missing.csv"], "no such file", "give a text, or the path"),
        (["empty.txt"], "there are no rows to classify", "give a text"),
        (["latin.txt"], "not written in UTF-8", "save it as UTF-8"),
        (["gap.csv"], "1 of 2 rows cannot be read", "fix these rows"),
        (["other.csv"], "no column for the text", "name the column with --column"),
        (["rows.tsv"], "not read from such a file", "give one of these"),
        (["."], "not read from a folder", "give one of these"),
    ],
)
def test_a_file_that_cannot_be_read_whole_is_refused(
    rows: list[str], what: str, action: str, text_program: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "gap.csv").write_text("text\na\n  \n")
    (tmp_path / "other.csv").write_text("review\na\n")
    (tmp_path / "rows.tsv").write_text("text\na\n")
    with pytest.raises(EdgetuneError) as caught:
        cli_predict.predict(text_program[2].path, rows)
    assert what in caught.value.what
    assert caught.value.action.startswith(action)


def test_a_sentence_that_names_a_file_is_a_text(text_program: Small) -> None:
    assert cli_predict.predict(text_program[2].path, ["please open notes.txt", "long " * 200 + "a.txt", "." * 5]) == 0


def test_what_a_program_lacks_is_named(text_program: Small, tmp_path: Path) -> None:
    torch.manual_seed(0)
    bare = export(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.randn(1, 3, 4), tmp_path / "bare.pte")
    with pytest.raises(
        EdgetuneError, match=r"does not say how its inputs are made .* nor what its output means"
    ) as caught:
        Predictor(bare.path)
    assert caught.value.exit_code == Exit.EXPORT
    with pytest.raises(EdgetuneError, match="no such program"):
        Predictor(tmp_path / "bear.pte")
    with pytest.raises(EdgetuneError, match=r"must end in \.pte"):
        Predictor(tmp_path / "bare.json")
    kinds: dict[ProgramKind, str] = {"language": "edgetune generate", "training": "edgetune train-pte"}
    for kind, verb in kinds.items():
        with pytest.raises(EdgetuneError, match="does not answer for single rows") as caught:
            Predictor(stored(tmp_path, kind).path)
        assert caught.value.action.startswith(verb)


def test_classes_without_names_are_numbered_and_the_reader_told(
    text_program: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in text_program[2].path.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((tmp_path / "model.json").read_text())
    manifest["carried"]["labels"] = []
    (tmp_path / "model.json").write_text(json.dumps(manifest))
    assert cli_predict.predict(tmp_path / "model.pte", ["a"], top=1) == 0
    printed = capsys.readouterr()
    assert printed.out.split(": ")[1].split()[0] in ("0", "1", "2")
    assert "no class names" in printed.err


def labelled(path: Path, rows: Sequence[str], labels: Sequence[str]) -> None:
    lines = [json.dumps({"text": row, "label": label}) for row, label in zip(rows, labels, strict=True)]
    path.write_text("\n".join(lines), encoding="utf-8")


def test_eval_counts_what_the_program_answers(
    text_program: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, dataset, artifact = text_program
    rows = [str(row) for row in dataset.test.inputs]
    answers = [one.label for one in predict(artifact.path, rows)]
    wrong = [dataset.classes[(dataset.classes.index(label) + 1) % 3] for label in answers]
    labels = [false if place % 4 == 0 else true for place, (true, false) in enumerate(zip(answers, wrong, strict=True))]
    labelled(tmp_path / "rows.jsonl", rows, [label.upper() for label in labels])
    program = str(artifact.path)
    assert main(["eval", program, "--data", f"jsonl:{tmp_path / 'rows.jsonl'}", "--split", "all", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    mistakes = len(rows[::4])
    assert (figures["rows"], figures["accuracy_pct"]) == (len(rows), pytest.approx(100 - 100 * mistakes / len(rows)))
    low, high = figures["interval_95_pct"]
    assert low < figures["accuracy_pct"] < high
    assert sum(one["rows"] for one in figures["confusions"]) == mistakes
    assert {one["name"]: one["rows"] for one in figures["classes"]} == {
        name: labels.count(name) for name in dataset.classes
    }
    assert {one["text"] for one in figures["mistakes"]} == {" ".join(row.split())[:200] for row in rows[::4]}
    assert main(["eval", program, "--data", f"jsonl:{tmp_path / 'rows.jsonl'}", "--split", "all"]) == 0
    printed = capsys.readouterr().out
    assert "75.00 % accuracy on 24 rows (95 % interval: 55.1 to 88.0 %)" in printed
    assert max(map(len, printed.splitlines())) <= 80
    for heading in ("Classes", "Confusion matrix", "The most confident mistakes"):
        assert heading in printed


def test_eval_of_a_few_rows_of_one_class_and_of_strange_ones(text_program: Small, tmp_path: Path) -> None:
    artifact = text_program[2]
    labelled(tmp_path / "one.jsonl", ["a"], ["no"])
    answers = evaluate(artifact.path, f"jsonl:{tmp_path / 'one.jsonl'}", part="all")
    assert answers.quality.rows == 1
    assert [one.rows for one in answers.answers.classes] == [1, 0, 0]
    labelled(tmp_path / "strange.jsonl", ["a", "b"], ["no", "never"])
    with pytest.raises(EdgetuneError, match="does not have: never") as caught:
        evaluate(artifact.path, f"jsonl:{tmp_path / 'strange.jsonl'}", part="all")
    assert caught.value.exit_code == Exit.DATA
    with pytest.raises(EdgetuneError, match="no recipe next to"):
        evaluate(artifact.path)
    with pytest.raises(EdgetuneError, match="not a setting of the data"):
        evaluate(artifact.path, "jsonl:x", overrides={"data.lable": "y"})


def test_eval_takes_the_data_of_the_recipe_beside_the_program(
    text_program: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in text_program[2].path.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rows = [f"text {number}" for number in range(40)]
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        lines = [(row, CLASSES[place % 3]) for place, row in enumerate(rows)]
        csv.writer(file).writerows([("review", "stars"), *lines])
    data: dict[str, Any] = {
        "source": f"csv:{tmp_path / 'rows.csv'}",
        "text": "review",
        "label": "stars",
        "test_pct": 25.0,
    }
    recipe = {"name": "mine", "model": "minilm", "data": data, "steps": ["eval"]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["eval", str(tmp_path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["data"], figures["split"], figures["rows"]) == ("rows.csv", "test", 10)
    held_back = from_csv(str(tmp_path / "rows.csv"), DataSettings.model_validate(data)).test
    assert figures["accuracy_pct"] == evaluate(tmp_path, DataSettings.model_validate(data)).quality.value
    assert len(held_back) == 10
    assert main(["eval", str(tmp_path), "data.test_pct=50", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 20
    assert main(["predict", str(tmp_path), str(tmp_path / "rows.csv"), "--json"]) == 0
    assert [one["row"] for one in json.loads(capsys.readouterr().out)] == rows, "the recipe names the column"
    # another file of the same layout: columns and names of labels are the recipe's
    (tmp_path / "other.csv").write_text("title,body,stars\nfine,so good,1\npoor,so bad,0\n")
    data |= {"text": ["title", "body"], "label_names": {"0": CLASSES[0], "1": CLASSES[2]}, "test_rows": 4}
    (tmp_path / "recipe.yaml").write_text(json.dumps({**recipe, "data": data}))
    assert main(["predict", str(tmp_path), str(tmp_path / "other.csv"), "--json"]) == 0
    assert [one["row"] for one in json.loads(capsys.readouterr().out)] == ["fine\nso good", "poor\nso bad"]
    assert main(["eval", str(tmp_path), "--data", f"csv:{tmp_path / 'other.csv'}", "--split", "all", "--json"]) == 0
    assert [one["rows"] for one in json.loads(capsys.readouterr().out)["classes"]] == [1, 0, 1]


def test_eval_of_image_folders(picture_program: Small, tmp_path: Path) -> None:
    loaded, dataset, artifact = picture_program
    paths = list(dataset.test.inputs)
    predicted = logits_of(loaded, paths).argmax(1).tolist()
    for path, place in zip(paths, predicted, strict=True):
        folder = tmp_path / dataset.classes[place]
        folder.mkdir(exist_ok=True)
        (folder / Path(path).name).write_bytes(Path(path).read_bytes())
    evaluation = evaluate(artifact.path, f"imagefolder:{tmp_path}", part="all")
    assert (evaluation.quality.value, evaluation.quality.rows) == (100.0, len(paths))
    labelled(tmp_path / "rows.jsonl", ["a"], ["dark"])
    with pytest.raises(EdgetuneError, match="takes images with classes, and the data has texts with classes"):
        evaluate(artifact.path, f"jsonl:{tmp_path / 'rows.jsonl'}", part="all")


def test_whole_data_keep_every_row_whatever_their_number(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\na,x\nb,x\na,x\n")
    data = from_csv(str(tmp_path / "rows.csv"), WholeData(source="csv:rows.csv"))
    assert (len(data.train), len(data.validation), data.test.inputs) == (0, 0, ["a", "b", "a"])


def test_answers_are_counted_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0], [0.0, 9.0]])
    images = np.zeros((4, 8, 8), np.uint8)
    answers = count_answers(("cat", "dog"), Rows(images, [0, 0, 1, 0]), logits, images=True)
    cat, dog = answers.classes
    assert (cat.rows, cat.predicted, cat.right, cat.precision_pct) == (3, 2, 1, 50.0)
    assert cat.recall_pct == pytest.approx(100 / 3)
    assert (dog.rows, dog.predicted, dog.right, dog.precision_pct, dog.recall_pct) == (1, 2, 0, 0.0, 0.0)
    assert [(one.true, one.predicted, one.rows) for one in answers.confusions] == [("cat", "dog", 2), ("dog", "cat", 1)]
    assert [one.row for one in answers.mistakes] == [3, 1, 2], "the surest first"
    assert answers.mistakes[0].confidence_pct == pytest.approx(100 * float(torch.tensor(9.0).sigmoid()))
    assert all(one.image.startswith("data:image/png;base64,") and len(one.image) < 400 for one in answers.mistakes)
    assert answers.quality.value == 25.0


def test_a_program_for_several_rows_at_once_answers_any_number(picture_program: Small, tmp_path: Path) -> None:
    loaded, dataset, artifact = picture_program
    paths = list(dataset.test.inputs)
    pair = export(loaded.model, loaded.encode(paths[:2]), tmp_path / "pair.pte", carried=artifact.manifest.carried)
    assert pair.manifest.main.inputs[0].shape[0] == 2
    assert len(paths) % 2, "the last batch is filled up"
    assert [one.label for one in predict(pair.path, paths)] == [one.label for one in predict(artifact.path, paths)]
    free = export(
        loaded.model, loaded.encode(paths[:2]), tmp_path / "free.pte", carried=artifact.manifest.carried,
        dynamic={"batch": (1, 4)},
    )  # fmt: skip
    assert [one.label for one in predict(free.path, paths)] == [one.label for one in predict(artifact.path, paths)]
