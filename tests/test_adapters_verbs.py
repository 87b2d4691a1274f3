"""Adapters on the command line, and in text-generation programs: export, predict, generate."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from edgetune.cli.main import main
from edgetune.core.errors import EdgetuneError
from edgetune.export.kit import copy_to_kit
from edgetune.export.kit import find as find_platform
from edgetune.export.language.parity import eager_logits
from edgetune.program.manifest import AdapterForm
from edgetune.program.tokenizer import ChatTokenizer
from edgetune.run.predicting import predict
from edgetune.runtime.generating import generate
from support.adapters import adapted, save_lora
from support.checkpoints import save_bert
from support.decoders import decoder, export_decoder

TEXTS = ["a good text", "very bad"]
TARGETS = ["q_proj", "v_proj", "up_proj"]


def test_a_base_is_exported_with_adapters_and_predicts_with_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_bert(tmp_path / "base")
    folders = {
        name: save_lora(model, tmp_path / name, ["query", "dense"], seed=place, lora_alpha=16)
        for place, name in enumerate(("en", "legal"))
    }
    path, base = tmp_path / "model.pte", f"hf:{tmp_path / 'base'}"
    asked = [part for name, folder in folders.items() for part in ("--adapter", f"{name}={folder}")]
    assert main(["export", base, "-o", str(path), *asked]) == 0
    scores = {}
    for name, folder in folders.items():
        merged = tmp_path / f"merged-{name}.pte"
        assert main(["export", base, "-o", str(merged), "--adapter", str(folder)]) == 0
        assert not list(tmp_path.glob(f"merged-{name}.*.safetensors"))
        capsys.readouterr()
        assert main(["predict", str(path), *TEXTS, "--adapter", name, "--json"]) == 0
        scores[name] = [one["score"] for one in json.loads(capsys.readouterr().out)]
        assert scores[name] == pytest.approx([one.score for one in predict(merged, TEXTS)], abs=1e-4)  # type: ignore[union-attr]
    alone = [one.score for one in predict(path, TEXTS)]  # type: ignore[union-attr]
    assert len({*map(tuple, scores.values()), tuple(alone)}) == 3
    with pytest.raises(EdgetuneError, match=r"the sample code of a kit runs no adapter: got .*legal"):
        copy_to_kit(path, find_platform("linux"), tmp_path / "kit")


RECIPE = """
model: {source: "hf:base", max_length: 16}
data: "csv:rows.csv"
steps: [int8_dynamic]
export: {adapters: {en: en, legal: legal}, check_rows: 4}
"""


def test_a_recipe_exports_its_model_with_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {0: "down", 1: "up"}
    model = save_bert(tmp_path / "base", num_labels=2, id2label=names, label2id={n: i for i, n in names.items()})
    for place, name in enumerate(("en", "legal")):
        save_lora(model, tmp_path / name, ["query", "dense"], seed=place, lora_alpha=16)
    rows = [f"{'good' if n % 2 else 'bad'} text {n},{names[n % 2]}" for n in range(60)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    written = tmp_path / "mine.yaml"
    written.write_text(RECIPE, encoding="utf-8")
    assert main(["run", str(written), "--out", str(tmp_path / "run")]) == 0
    path = tmp_path / "run" / "model.pte"
    scores = {name: [one.score for one in predict(path, TEXTS, adapter=name)] for name in (None, "en", "legal")}  # type: ignore[union-attr]
    assert len({*map(tuple, scores.values())}) == 3
    capsys.readouterr()
    assert main(["run", str(written), "export.adapters={en: nowhere}", "--out", str(tmp_path / "other")]) != 0
    assert "export.adapters, en" in capsys.readouterr().err
    assert main(["run", str(written), "export.adapters={}", "export.form=files", "--out", str(tmp_path / "more")]) == 2
    assert "form is for adapters, and there are none: got 'files'" in capsys.readouterr().err


def test_adapters_are_combined_and_the_errors_stated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_bert(tmp_path / "base")
    folders = [str(save_lora(model, tmp_path / name, ["query"], seed=n)) for n, name in enumerate(("en", "legal"))]
    call = ["combine", f"hf:{tmp_path / 'base'}", *folders, "-o", str(tmp_path / "both")]
    assert main([*call, "--weight", "1", "--weight", "-0.5"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'both'}: 1 layers of rank 8, ")
    assert main([*call, "--method", "ties", "--density", "0.3", "--rank", "4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer["ranks"].values()) == {4}
    assert 0.01 < answer["error"] < 1
    path = tmp_path / "model.pte"
    asked = ["--adapter", f"both={tmp_path / 'both'}"]
    assert main(["export", f"hf:{tmp_path / 'base'}", "-o", str(path), *asked, "--adapter-rank", "4"]) == 2
    assert "these are LoRAs, which keep their ranks" in capsys.readouterr().err
    assert main([*call, "--weight", "1"]) == 2
    assert "weights: there are 2 adapters" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["inputs", "files"])
def test_a_language_program_answers_with_each_adapter(
    form: AdapterForm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = decoder("Llama", num_hidden_layers=1, num_key_value_heads=2, tie_word_embeddings=True)
    folders = {
        name: save_lora(model, tmp_path / name, TARGETS[: 3 - place], seed=place, rank=4 - place)
        for place, name in enumerate(("en", "legal"))
    }
    artifact = export_decoder(model, tmp_path, adapters=folders, form=form, check_tokens=8)
    spec = artifact.manifest.adapters
    assert spec is not None
    for file in spec.files:
        assert file.parity is not None
        assert file.parity.same_prediction_pct == 100
    prompt = ChatTokenizer(artifact).tokens("hi", raw=True)
    answers = {}
    for name in [*folders, *([None] if form == "inputs" else [])]:
        answers[name] = generate(artifact.path, "hi", max_tokens=6, adapter=name, raw=True).tokens
        with adapted(model, folders[name]) if name is not None else nullcontext():
            expected = eager_logits(model, prompt, answers[name])
        assert expected.argmax(-1).tolist() == list(answers[name])
    assert len(set(answers.values())) == len(answers)
    capsys.readouterr()
    assert (
        main(["generate", str(artifact.path), "hi", "--max-tokens", "6", "--raw", "--adapter", "legal", "--json"]) == 0
    )
    assert tuple(json.loads(capsys.readouterr().out)["tokens"]) == answers["legal"]
