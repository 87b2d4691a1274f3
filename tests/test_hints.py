"""What was probably meant: an error about a name, a file or a pattern ends with what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from edgetune.core import registry
from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import select
from edgetune.recipe.recipe import parse
from edgetune.run.exporting import load_exportable


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
        load_exportable(model)


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
