"""What was probably meant: an error about a name, a file or a pattern ends with what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import edgetune as et
from edgetune import registry
from edgetune.cli import main
from edgetune.data.dataset import DataSettings
from edgetune.data.tables import from_csv
from edgetune.exporting import exportable
from edgetune.models.loaded import only
from edgetune.recipe import parse
from edgetune.targets import select
from edgetune.technique import EdgetuneError, Exit


def recipe_error(model: str = "minilm", data: str = "tweets") -> str:
    with pytest.raises(EdgetuneError) as error:
        parse(f'model: "{model}"\ndata: "{data}"\nsteps: [train]', "mine.yaml")
    return str(error.value)


@pytest.mark.parametrize(
    ("model", "near"),
    [
        ("tinybert", "hf:tinybert"),
        ("prajjwal1/bert-tiny", "hf:prajjwal1/bert-tiny"),
        ("minilmm", "minilm"),
        ("effnet", "effnet-lite0"),
        ("huggingface:a/b", "hf:a/b"),
        ("tim:resnet18", "timm:resnet18"),
    ],
)
def test_models(model: str, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_error(model=model).endswith(f"did you mean {near!r}?")
    with pytest.raises(EdgetuneError, match=f"unknown model.*did you mean '{near}'"):
        registry.loader(registry.MODELS, "model", model)
    with pytest.raises(EdgetuneError, match=f"unknown model.*did you mean '{near}'"):
        exportable(model)


@pytest.mark.parametrize(
    ("data", "near"),
    [
        ("cvs:reviews.csv", "csv:reviews.csv"),
        ("json:reviews.json", "jsonl:reviews.json"),
        ("reviews.csv", "csv:reviews.csv"),
        ("folder/reviews.jsonl", "jsonl:folder/reviews.jsonl"),
        ("images:photos", "imagefolder:photos"),
        ("photos", "imagefolder:photos"),
        ("twets", "tweets"),
    ],
)
def test_data(data: str, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert recipe_error(data=data).endswith(f"did you mean {near!r}?")


def test_what_is_no_model_says_so() -> None:
    for source, action in {"m.pth": "--weights", "m.pte": "made from", "r.yaml": "edgetune run"}.items():
        with pytest.raises(EdgetuneError, match=f"(?s)unknown model.*next: .*{action}"):
            exportable(source)
    with pytest.raises(EdgetuneError, match=r"did you mean 'py:net\.py:build'"):
        exportable("net.py")


def load_csv(path: Path) -> str:
    with pytest.raises(EdgetuneError) as error:
        from_csv(str(path), DataSettings(source=f"csv:{path}"))
    assert error.value.exit_code == Exit.DATA
    return str(error.value)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "othernames.csv").touch()
    (tmp_path / "reviews.csv").touch()
    assert "did you mean" not in load_csv(tmp_path / "nothere.csv")
    assert "othernames" not in load_csv(tmp_path / "nothere.csv")
    assert "did you mean 'reviews.csv'?" in load_csv(tmp_path / "review.csv")
    assert load_csv(tmp_path / "a.jsonl").endswith(f"did you mean 'jsonl:{tmp_path}/a.jsonl'?")


def test_a_file_in_another_encoding_is_to_be_saved_as_utf_8(tmp_path: Path) -> None:
    rows = [f"caf\xe9 number {n},{n % 2}" for n in range(50)]
    (tmp_path / "latin.csv").write_text("\n".join(["text,label", *rows]), encoding="latin-1")
    written = load_csv(tmp_path / "latin.csv")
    assert "50 of 50 rows cannot be read (100 %, allowed 1 %)" in written
    assert "next: save the file as UTF-8" in written
    rows = [*rows[:2], *(f"cafe {n},{n % 2}" for n in range(50)), *["too,many,commas"] * 9]
    (tmp_path / "mixed.csv").write_text("\n".join(["text,label", *rows]), encoding="latin-1")
    assert "next: fix these rows" in load_csv(tmp_path / "mixed.csv")


def test_a_model_for_other_rows_says_what_rows_it_takes() -> None:
    with pytest.raises(EdgetuneError) as error:
        only(("text-classification", "causal-lm"), "hf:tiny", "image-classification")
    assert str(error.value) == (
        "hf:tiny cannot do the task of this data set: the rows are images with classes, "
        "and it takes texts with classes or texts without classes\n"
        "  next: choose effnet-lite0 or timm:NAME, or other data"
    )


def test_patterns() -> None:
    names = ("query", "key", "value", "output_projection")
    block = nn.ModuleDict({"attention": nn.ModuleDict({name: nn.Linear(2, 2) for name in names})})
    model = nn.ModuleDict({"layers": nn.ModuleList([block, nn.ModuleDict({"norm": nn.LayerNorm(2)})])})
    for pattern, near in {
        "quary": "*.query",
        "*.quary": "*.query",
        "q": "",
        "out_projection": "*.output_projection",
        "layers.0.attention.kee": "layers.0.attention.key",
    }.items():
        with pytest.raises(EdgetuneError) as error:
            select(model, [pattern], kind=nn.Linear)
        assert (f"did you mean {near!r}?" if near else "") in str(error.value)
        assert ("did you mean" in str(error.value)) == bool(near)
        assert "allowed: *.query, *.key, *.value, *.output_projection" in str(error.value)


def test_generate_says_how_to_have_a_program_that_talks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plain.pte"
    et.export(nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(1, 4), path)
    assert main(["generate", str(path), "Hello"]) == 5
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("a program of another kind: this is a plain program, not a text-generation program")
    assert second == "  next: export the model with --language to have one that generates text"
