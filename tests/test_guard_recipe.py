"""A recipe with a guard: a language model, trained on texts with classes, exported as one program for both."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import edgetune as et
from edgetune.core.errors import EdgetuneError
from edgetune.core.ledger import Ledger
from support.checkpoints import save_llama, save_rows
from support.command_line import Answer
from support.laws import logits

torch.set_num_threads(1)

STEPS = "[{lora_guard: {targets: ['*.q_proj', '*.v_proj'], rank: 2, classes: ['0', '1']}}, "
TRAIN = "{train: {epochs: 4, batch_size: 16, learning_rate: 1e-2}}]"
DATA = "model: {source: 'hf:writer', max_length: 12}\ndata: csv:rows.csv\n"
EXPORT = "\nexport: {language: true, max_tokens: 16, check_rows: 4}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    save_llama(folder / "writer", num_hidden_layers=1)
    save_rows(folder / "rows.csv")
    (folder / "guard.yaml").write_text(DATA + "steps: " + STEPS + TRAIN + EXPORT, encoding="utf-8")
    et.run(folder / "guard.yaml", out=folder / "run")
    return folder


def test_the_guard_learns_and_the_base_stays(folder: Path) -> None:
    ledger = Ledger.read(folder / "run" / "ledger.json")
    assert [row.step for row in ledger.rows] == ["lora_guard", "train", "finalize"]
    assert ledger.rows[-1].quality is not None
    assert ledger.rows[-1].quality.value > 90
    run = et.open_run(folder / "run")
    model: Any = run.model
    plain = load_model_alone(folder)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.base.state_dict().items())
    again = et.load_guard(plain, folder / "run" / "guard.safetensors")
    inputs = run.loaded.encode(["good text", "bad very a"])
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def load_model_alone(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "writer").eval()


def test_the_command_line_asks_for_text_and_for_classes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = str(folder / "run" / "model.pte")
    assert Answer(capsys, "generate", program, "good", "--max-tokens", "3", "--raw").code == 0
    answer = Answer(capsys, "predict", program, "very good text", "bad a")
    assert answer.code == 0, answer.err
    first, second = answer.out.splitlines()
    assert first.startswith("very good text: 1 ")
    assert second.startswith("bad a: 0 ")
    scored = et.evaluate(folder / "run")
    assert scored.quality.value > 90


@pytest.mark.parametrize(
    ("data", "steps", "message"),
    [
        (DATA, "[{lora_guard: {targets: ['*.q_proj']}}, train]", "are not the classes of the data"),
        (DATA, "[lean, " + STEPS[1:] + "train]", "make lora_guard the first step"),
        (
            "model: {source: 'hf:writer', max_length: 12}\ndata: {source: 'csv:rows.csv', label: null}\n",
            STEPS + "train]", "learns from texts with classes",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_any_work(
    data: str, steps: str, message: str, folder: Path, tmp_path: Path
) -> None:
    for name in ("writer", "rows.csv"):
        (shutil.copytree if (folder / name).is_dir() else shutil.copy)(folder / name, tmp_path / name)
    (tmp_path / "r.yaml").write_text(data + "steps: " + steps, encoding="utf-8")
    with pytest.raises(EdgetuneError, match=message):
        et.run(tmp_path / "r.yaml", out=tmp_path / "run")
