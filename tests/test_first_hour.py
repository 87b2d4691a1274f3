"""The first hour of a new user: the scripts in first_hour/, line by line, in an empty folder."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgetune.cli.main import main
from edgetune.core.ledger import Ledger
from support.checkpoints import save_bert, save_images

SCRIPTS = Path(__file__).with_name("first_hour")
NET = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

def inputs():
    return [torch.randn(1, 6) for _ in range(3)]
"""
MENDED = """
name: mended
model: {source: "hf:checkpoint", max_length: 8}
data: {source: "csv:reviews.csv", text: review, label: sentiment}
steps:
  - sparse-update: {scheme: last-1}
  - train: {updates: 2, batch_size: 4}
  - prune: {ratio: 0.3, what: [ffn]}
  - int4: {skip: [clasifier]}
"""


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def follow(script: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What each line of the script printed; a line that is to fail says with which exit code."""
    printed = []
    for line in (SCRIPTS / script).read_text(encoding="utf-8").splitlines():
        if not line.startswith("edgetune "):
            continue
        command, _, comment = line.partition("  # exit ")
        capsys.readouterr()
        code = main(shlex.split(command)[1:])
        streams = capsys.readouterr()
        assert code == int(comment[:1] or 0), f"{line}\n{streams.err}"
        printed.append(streams.out + (streams.err if code else ""))
    return printed


def reviews() -> None:
    save_bert(Path("checkpoint"), "Model", hidden_size=64, intermediate_size=256, num_hidden_layers=2)
    rows = [
        f"{n},{'good' if n % 2 else 'bad'} text {'very ' * (n % 7)}a,{'up' if n % 2 else 'down'}" for n in range(80)
    ]
    Path("reviews.csv").write_text("\n".join(["id,review,sentiment", *rows]), encoding="utf-8")


def test_own_csv(capsys: pytest.CaptureFixture[str]) -> None:
    reviews()
    _, _, answer, figures = follow("1_own_csv.sh", capsys)
    assert "up" in answer
    assert "accuracy" in figures.lower()
    recipe = Path("reviews.yaml").read_text(encoding="utf-8")
    assert '"csv:reviews.csv", text: "review", label: "sentiment"' in recipe


def test_a_new_recipe_draws_a_new_head_where_the_old_one_is_for_other_classes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reviews()
    save_bert(Path("moods"), num_labels=3)
    save_bert(Path("votes"), num_labels=2, id2label={0: "up", 1: "down"}, label2id={"up": 0, "down": 1})
    for model, head in (("moods", True), ("votes", False), ("checkpoint", False)):
        assert (
            main(["recipes", "new", "--model", f"hf:{model}", "--data", "csv:reviews.csv", "-o", f"{model}.yaml"]) == 0
        )
        assert ("head: new" in Path(f"{model}.yaml").read_text(encoding="utf-8")) == head, model
    capsys.readouterr()


def test_own_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    from support.families import import_timm

    import_timm()
    save_images(Path("pictures"))
    *_, answer = follow("2_own_pictures.sh", capsys)
    assert "dark" in answer


def test_own_module(capsys: pytest.CaptureFixture[str]) -> None:
    Path("net.py").write_text(NET, encoding="utf-8")
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    save_file(net.state_dict(), "trained.safetensors")
    _, exported, profile = follow("3_own_module.sh", capsys)
    assert "net.py:inputs gave" in exported
    assert "CPU" in profile
    from edgetune.export import Artifact

    x = torch.randn(1, 6)
    torch.testing.assert_close(Artifact.load("net.pte").run(x)[0], net(x))


def test_finished_classifier(capsys: pytest.CaptureFixture[str]) -> None:
    save_bert(Path("classifier"), num_labels=2, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    exported, answer = follow("4_finished_classifier.sh", capsys)
    assert "classes: bad, good" in exported
    assert "made-up inputs" in exported
    assert "good" in answer


def test_mended_recipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reviews()
    Path("mended.yaml").write_text(MENDED, encoding="utf-8")
    ledgers = []
    monkeypatch.setattr(
        "edgetune.cli.main._show", lambda _: ledgers.append(Ledger.read(Path("runs/mended/ledger.json")))
    )
    failed, *_ = follow("5_mended_recipe.sh", capsys)
    assert "the pattern matches no layer" in failed
    assert "before any training" in failed
    first, second = ledgers
    trained = [[row for row in ledger.rows if row.step == "train"] for ledger in ledgers]
    assert trained[0] == trained[1], "with their time stamps"
    assert first.rows[-1].size_mib < second.rows[-1].size_mib
    assert json.loads(Path("runs/mended/ledger.json").read_text(encoding="utf-8"))["finished"]
