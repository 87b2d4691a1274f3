"""What newcomers get wrong: each mistake is answered in one clear line, with its exit code, before anything trains."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import edgetune as et
from edgetune.cli.main import main
from edgetune.core.errors import EdgetuneError
from support.checkpoints import save_bert
from support.mistakes import DATA_FAULTS, MISTAKES, NET, jsonl, recipe, table

NO_WORDS_OF_OURS = ("Traceback", "pydantic", "RuntimeError", "ValidationError", "KeyError", "Errno")
MOST_LETTERS = 420  # of a line, about five of a terminal's


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a newcomer has lying about."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("things")
    save_bert(folder / "tinybert", "Model", hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    classes = {0: "neutral", 1: "bad", 2: "good"}
    save_bert(folder / "lab", num_labels=3, id2label=classes, label2id={name: n for n, name in classes.items()})
    (folder / "reviews.csv").write_text(table(["good", "bad"] * 20), encoding="utf-8")
    (folder / "othernames.csv").touch()
    (folder / "rows.jsonl").write_text(jsonl('"a"'), encoding="utf-8")
    (folder / "mymodel.py").write_text(NET, encoding="utf-8")
    torch.save(nn.Linear(2, 2).state_dict(), folder / "w.pth")
    save_file(nn.Linear(2, 2).state_dict(), folder / "w.safetensors")
    (folder / "junk.pte").write_bytes(b"junk")
    et.export(nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(1, 4), folder / "classifier.pte")
    generator = np.random.default_rng(0)
    for place, count in {"photos/cat": 10, "photos/dog": 10, "cats/cat": 10, "few/a": 1, "few/b": 1}.items():
        (folder / place).mkdir(parents=True)
        for n in range(count):
            pixels = generator.integers(0, 256, (28, 28, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / place / f"{n}.png")
    (folder / "nothing").mkdir()
    return folder


@pytest.fixture(autouse=True)
def here(things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own with these things in it, on a machine that reaches no hub."""
    for each in things.iterdir():
        (tmp_path / each.name).symlink_to(each)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    return tmp_path


def answer_of(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code, and what stands on stderr."""
    capsys.readouterr()
    code = main(shlex.split(command))
    return code, capsys.readouterr().err


def trained() -> bool:
    return any(Path().rglob("checkpoints"))


def check_lines(text: str, says: tuple[str, ...]) -> None:
    """One line for one mistake and what to do next, in words, with all that it has to say."""
    lines = text.splitlines()
    problems = [line for line in lines if not line.startswith("  next: ")]
    several = re.search(r": (\d+) errors:$", problems[0])
    assert len(problems) == (1 + int(several[1]) if several else 1), text
    assert len(lines) - len(problems) <= max(1, len(problems) - 1)
    assert max(map(len, lines)) <= MOST_LETTERS, text
    assert not [word for word in NO_WORDS_OF_OURS if word in text], text
    for words in says:
        assert words in text, f"{words!r} is not in\n{text}"


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_in_a_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    mistake = MISTAKES[name]
    if not isinstance(mistake.command, str):
        with pytest.raises(EdgetuneError) as caught:
            mistake.command()
        check_lines(str(caught.value), mistake.says)
        assert caught.value.exit_code == mistake.code
        return
    if mistake.recipe:
        Path("r.yaml").write_text(mistake.recipe, encoding="utf-8")
    code, err = answer_of(mistake.command, capsys)
    before, _, answer = err.partition("edgetune: ")
    check_lines(answer, mistake.says)
    assert code == mistake.code
    assert not re.search(r"^\d+ train ", before, re.MULTILINE)
    assert not trained()
    assert not list(Path().glob("*.onnx"))


@pytest.mark.parametrize("name", DATA_FAULTS)
def test_a_fault_of_the_data_is_answered_in_a_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    fault = DATA_FAULTS[name]
    for file in ("rows.csv", "rows.csv2"):
        Path(file).write_bytes(fault.content if isinstance(fault.content, bytes) else fault.content.encode())
    Path("r.yaml").write_text(recipe(data=fault.data), encoding="utf-8")
    code, err = answer_of("run r.yaml", capsys)
    check_lines(err.partition("edgetune: ")[2], fault.says)
    assert code == 3
    assert not trained()


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        (["good", "bad"] * 3, "note: only 1 row to test on: give more, or data.test_file"),
        (["1", "2", "good"] * 20, "note: the labels mix numbers (1, 2) and words (good)"),
        (["good", "Good", "bad"] * 20, "note: labels that differ only in capitals or spaces are separate classes"),
        (["2024-01-02", "2024-01-03"] * 20, "note: the labels in column 'label' look like dates"),
        (["good"] * 60 + ["bad"] * 6, "train.class_weights: balanced"),
    ],
)
def test_doubts_about_the_data_are_told_before_the_training(
    labels: list[str], note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rows.csv").write_text(table(labels), encoding="utf-8")
    Path("r.yaml").write_text(recipe(data="csv:rows.csv"), encoding="utf-8")
    assert main(["run", "r.yaml"]) == 0
    out, err = capsys.readouterr()
    before, training, _ = err.partition("\n1 train")
    assert training
    assert note in before
    if len(labels) == 6:
        words = " ".join(out.split())
        assert "! The result is no better than a simple baseline" in words
        assert "is uncertain: its 95 % interval is 20.7 to 100.0 %" in words


# Mistakes that are none any more


def test_prune_and_int4_fit_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    steps = "[train: {updates: 1}, prune: {ratio: 0.25, what: [ffn]}, int4]"
    Path("r.yaml").write_text(recipe(steps), encoding="utf-8")
    assert main(["run", "r.yaml"]) == 0, capsys.readouterr().err


def test_pictures_may_be_so_small_that_one_pixel_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    model = "{source: 'py:mymodel.py:build', image_px: 32}"
    Path("r.yaml").write_text(recipe(model=model, data="imagefolder:photos"), encoding="utf-8")
    assert main(["run", "r.yaml"]) == 0, capsys.readouterr().err


def test_a_comparison_leaves_out_what_is_not_calibrated_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "compare", "classifier.pte", "--devices", "pixel-8,raspberry-pi-5,host"]) == 0
    compared, _, left_out = capsys.readouterr().out.partition("left out")
    assert "pixel-8" in compared
    assert "raspberry-pi-5" in compared
    assert "host: this host has no descriptor yet; next: run `edgetune devices calibrate`" in left_out


def test_ctrl_c_and_changed_settings_cost_no_training(capsys: pytest.CaptureFixture[str]) -> None:
    steps = "[train: {updates: 1}, prune: {ratio: 0.5, round_to: 1}, train: {updates: 1}]"
    model = "{source: 'py:mymodel.py:build', image_px: 32}"
    Path("r.yaml").write_text(recipe(steps, model, "imagefolder:photos"), encoding="utf-8")
    Path("ctrl-c").touch()
    code, err = answer_of("run r.yaml --out done", capsys)
    assert code == 130
    command = "edgetune run r.yaml --resume --out done"
    assert err.splitlines()[-1] == f"edgetune: interrupted; continue with: {command}"
    Path("ctrl-c").unlink()
    assert main(shlex.split(command)[1:]) == 0
    code, err = answer_of(f"{command.removeprefix('edgetune ')} steps.2.ratio=0.25", capsys)
    assert code == 0
    assert "reuse 2/2 load, train of done" in err
    assert "1 train" not in err
    assert "\n3 train" in err
