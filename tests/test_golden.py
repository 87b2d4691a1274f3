"""The recipes for data of one's own, in their smoke variant, by name, in a folder that holds what they look for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgetune.cli.main import main
from edgetune.core.ledger import Ledger
from support import decoders
from support.checkpoints import save_bert, save_images

CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [f"{'good' if n % 2 else 'bad'} text {'very ' * (n % 7)}a,{'up' if n % 2 else 'down'}" for n in range(80)]
    Path("reviews.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")


def save_encoder(**more: int) -> str:
    """A BERT of two layers in place of the recipe's MiniLM, which text-minilm's tests run."""
    save_bert(Path("encoder"), "Model", max_position_embeddings=64, **{**SIZES, **more})
    return "model.source=hf:encoder"


def save_decoder() -> str:
    """A Llama of one layer, which reads bytes, in place of the recipe's SmolLM2, which lm-smollm2's tests run."""
    tokenizer = decoders.tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained("decoder")
    decoders.llama().save_pretrained("decoder")
    return "model.source=hf:decoder"


def run(name: str, *changes: str) -> Ledger:
    measured = () if name == "train-on-device" else ("profile.measure=false",)  # text-minilm's tests do
    assert main(["run", name, "variant=smoke", "--out", "runs/one", *measured, *changes]) == 0
    return Ledger.read(Path("runs/one/ledger.json"))


def steps_of(ledger: Ledger) -> list[str]:
    return [row.step for row in ledger.rows]


def test_text_csv(capsys: pytest.CaptureFixture[str]) -> None:
    ledger = run("text-csv", save_encoder())
    assert steps_of(ledger) == ["load", "sparse-update", "train", "finalize", "int4"]
    assert ledger.rows[-1].size_mib < 0.3 * ledger.rows[0].size_mib
    capsys.readouterr()
    assert main(["predict", "runs/one/model.pte", "a very good text"]) == 0
    assert "up" in capsys.readouterr().out


def test_images_timm(capsys: pytest.CaptureFixture[str]) -> None:
    from support.families import import_timm

    import_timm()
    save_images(Path("images"))
    ledger = run("images-timm", "model.pretrained=false")
    assert steps_of(ledger) == ["load", "sparse-update", "train", "finalize", "int8"]
    assert ledger.rows[-1].size_mib < 0.35 * ledger.rows[0].size_mib
    assert main(["predict", "runs/one/model.pte", "images/dark/0.png"]) == 0


def test_chat_jsonl(capsys: pytest.CaptureFixture[str]) -> None:
    chats = [
        [{"role": "user", "content": f"What is {n} and 1?"}, {"role": "assistant", "content": f"{n + 1}."}]
        for n in range(60)
    ]
    lines = [json.dumps({"messages": messages}) for messages in chats]
    Path("chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    ledger = run("chat-jsonl", save_decoder(), "model.layers=null")
    assert steps_of(ledger) == ["load", "lora", "train", "finalize", "int4"]
    assert ledger.rows[2].quality is not None
    assert ledger.rows[2].quality.metric == "perplexity"
    capsys.readouterr()
    assert main(["generate", "runs/one/model.pte", "What is 2 and 1?", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()


def test_compress(capsys: pytest.CaptureFixture[str]) -> None:
    classes = {0: "up", 1: "down"}
    names = {"id2label": classes, "label2id": {name: n for n, name in classes.items()}}
    save_bert(Path("checkpoint"), num_labels=2, max_position_embeddings=64, **SIZES, **names)
    ledger = run("compress")
    assert steps_of(ledger) == ["load", "prune", "int4"]
    assert not ledger.trainings
    assert ledger.rows[1].macs < ledger.rows[0].macs
    assert ledger.answers is not None
    assert [one.name for one in ledger.answers.classes] == ["up", "down"], "in the checkpoint's order"


def test_distill_minilm() -> None:
    rows = ("data.source=csv:reviews.csv", "data.train_rows=null", "data.validation_rows=null", "data.test_rows=null")
    ledger = run("distill-minilm", save_encoder(num_hidden_layers=4), *rows, "depth.blocks=2", "export.check_rows=8")
    assert steps_of(ledger) == ["load", "sparse-update", "train", "finalize", "depth", "train", "int4"]
    assert ledger.rows[4].macs < 0.6 * ledger.rows[3].macs
    assert ledger.rows[4].trainable_parameters == ledger.rows[4].parameters
    assert main(["predict", "runs/one", "a good text"]) == 0


def test_train_on_device(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["variant=smoke", save_encoder()]
    assert steps_of(run("train-on-device", changes[1])) == ["load", "sparse-update", "train", "finalize"]
    assert main(["export-training", "train-on-device", *changes, "--rows", "4", "-o", "train.pte"]) == 0
    assert main(["train-pte", "train.pte", "train-on-device", *changes, "--steps", "2"]) == 0
    capsys.readouterr()
    assert main(["pull", "trained.safetensors", "train-on-device", *changes]) == 0
    assert "% accuracy" in capsys.readouterr().out
