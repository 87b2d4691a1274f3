"""The golden recipes from end to end, in their smoke variant: real models, real data, a real program."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import call, logits_of, tensors_of
from edgetune.core.ledger import Ledger
from edgetune.core.quiet import silence_libraries
from edgetune.recipe import recipe
from edgetune.report.tables import step_table
from edgetune.run import pipeline
from edgetune.run.finished import open_run
from edgetune.run.pipeline import Run
from edgetune.run.predicting import evaluate
from edgetune.runtime.generating import generate
from edgetune.runtime.run import run_in_child
from edgetune.train import checkpoint
from support.checkpoints import save_bert

FIGURES = ("parameters", "trainable_parameters", "size_mib", "macs", "saved_for_backward_mib")
SMOKE = {"variant": "smoke", "data.test_rows": 64, "train.updates": 2}  # of text-minilm
SMALL = """
name: small
model: {source: 'hf:FOLDER/encoder', max_length: 16}
data: 'csv:FOLDER/rows.csv'
steps:
  - sparse-update: {scheme: last-2}
  - lora: {targets: ["*.layer.0.*.query"]}
  - train: {updates: 6, batch_size: 4, checkpoint_every: 2}
  - prune: {ratio: 0.3, round_to: 32, importance: activation}
  - train: {updates: 6, batch_size: 4, checkpoint_every: 2, distill: {teacher: prune}}
  - int4
budget: {device: pixel-8, train_memory_mib: 1}
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run("text-minilm", tmp_path_factory.mktemp("text") / "run", **SMOKE)


def run(name: str, folder: Path, **changes: str | int) -> Run:
    with silence_libraries():
        return pipeline.run(name, {"variant": "smoke", **changes}, out=folder)


def steps_of(found: Run) -> list[str]:
    return [row.step for row in found.ledger.rows]


def test_text(text: Run) -> None:
    rows = {row.step: row for row in text.ledger.rows}
    assert steps_of(text)[:5] == ["load", "sparse-update", "lora", "train", "finalize"]
    assert steps_of(text)[-1] == "int4"
    # every step does what it is for
    assert rows["sparse-update"].saved_for_backward_mib < 0.5 * rows["load"].saved_for_backward_mib
    assert rows["sparse-update"].trainable_parameters < 0.3 * rows["load"].trainable_parameters
    assert rows["prune"].macs < 0.75 * rows["load"].macs
    assert rows["prune"].parameters < rows["load"].parameters
    assert rows["int4"].size_mib < 0.25 * rows["load"].size_mib
    assert all(row.quality is not None and row.quality.rows == 64 for row in text.ledger.rows)
    shift = rows["int4"].shift
    assert shift is not None
    assert (shift.predictions, 0 < shift.kl_divergence < 0.05, shift.changed_pct < 10) == (64, True, True)
    assert "of 64 predictions changed; KL divergence to the model before: " in " ".join(step_table(text.ledger).notes)
    assert [b.name for b in text.ledger.baselines] == ["always negative", "TF-IDF + logistic regression"]
    program = text.ledger.program
    assert program is not None
    assert program.parity is not None
    assert program.parity.same_prediction_pct >= 98
    assert program.delegated_macs_pct > 99
    assert program.size_mib < 19
    assert [of.where for of in text.ledger.layers] == [p.where for p in text.ledger.predicted]
    assert {p.device for p in text.ledger.predicted} >= {"pixel-8", "galaxy-s24", "raspberry-pi-5", "jetson-orin-nano"}
    assert [m.device for m in text.ledger.measured] == ["this host"]


def test_the_answers_of_the_final_model_and_of_its_program(text: Run) -> None:
    answers = text.ledger.answers
    assert answers is not None
    assert answers.quality == text.ledger.rows[-1].quality
    assert [one.name for one in answers.classes] == ["negative", "neutral", "positive"]
    assert sum(one.rows for one in answers.confusions) == 64 - sum(one.right for one in answers.classes)
    assert len(answers.mistakes) == min(10, sum(one.rows for one in answers.confusions))
    program = evaluate(text.folder)
    assert program.quality.rows == 64
    assert program.quality.value == pytest.approx(answers.quality.value, abs=2.0)


def test_the_folder_of_a_run(text: Run) -> None:
    names = {path.name for path in text.folder.iterdir()}
    assert {"recipe.yaml", "environment.json", "ledger.json", "report.html", "model.pte", "model.json"} <= names
    assert not [name for name in names if name.startswith(".")]  # nothing half-written
    assert (text.folder / "adapter" / "adapter_model.safetensors").is_file()
    assert Ledger.read(text.folder / "ledger.json") == text.ledger
    assert recipe.load(text.folder / "recipe.yaml").digest == recipe.load("text-minilm", SMOKE).digest
    assert json.loads((text.folder / "model.json").read_text())["sha256"] == text.ledger.program.sha256


def test_a_finished_run_is_opened_and_not_resumed(text: Run) -> None:
    with silence_libraries():
        restored = open_run(text.folder).exportable()
    rows = restored.check_inputs[:32]
    assert len(restored.check_inputs) == text.ledger.program.parity.rows
    told = run_in_child(text.program, [tensors_of(row) for row in rows])
    logits = [logits_of(call(restored.model, row)) for row in rows]
    assert sum(bool(a.argmax() == b[0].argmax()) for a, b in zip(logits, told, strict=True)) >= 31
    with pytest.raises(EdgetuneError, match="the run is finished"):
        pipeline.run("text-minilm", SMOKE, out=text.folder, resume=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    folder = tmp_path_factory.mktemp("small")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 3}
    save_bert(folder / "encoder", "Model", **sizes)
    rows = [f"{'good' if n % 2 else 'bad'} text {'very ' * (n % 7)}a,{n % 2}" for n in range(60)]
    (folder / "rows.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    (folder / "small.yaml").write_text(SMALL.replace("FOLDER", str(folder)), encoding="utf-8")
    return folder / "small.yaml", pipeline.run(folder / "small.yaml", out=folder / "whole")


def test_a_budget_that_does_not_hold(small: tuple[Path, Run]) -> None:
    (missed,) = small[1].missed
    assert missed.quantity == "train_memory_mib"
    assert missed.value > missed.least > 1


@pytest.fixture(scope="module")
def server() -> Any:
    """Children start from a process that has imported what a run needs, and has run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["edgetune.run.pipeline", "transformers.models.bert", "peft", "torch._dynamo", "pytest"]
    )
    return context


def run_until(path: Path, folder: Path, moment: tuple[str, int]) -> None:
    """Run, and be killed at that moment."""

    def kill(what: str, done: int, of: int, detail: str) -> None:
        if (what, done) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    pipeline.run(path, out=folder, progress=kill)


@pytest.mark.parametrize("moment", [("3 train", 5), ("prune", 1), ("5 train", 3)])
def test_killed_and_resumed_is_the_same_run(
    small: tuple[Path, Run], server: Any, moment: tuple[str, int], tmp_path: Path
) -> None:
    """SIGKILL in the middle of an epoch or between steps, then --resume: the same figures, losses and weights."""
    path, whole = small
    folder = tmp_path / "killed"
    child = server.Process(target=run_until, args=(path, folder, moment))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    resumed = pipeline.run(path, out=folder, resume=True)
    assert [t.losses for t in resumed.ledger.trainings] == [t.losses for t in whole.ledger.trainings]
    for a, b in zip(whole.ledger.rows, resumed.ledger.rows, strict=True):
        assert [getattr(a, f) for f in (*FIGURES, "quality")] == [getattr(b, f) for f in (*FIGURES, "quality")]
    names = [f / "checkpoints" / "05-train" / "update-00000006" for f in (whole.folder, folder)]
    left, right = (checkpoint.load(name)[0] for name in names)
    assert left.keys() == right.keys()
    assert all(left[key].equal(right[key]) for key in left)


def test_vision(tmp_path: Path) -> None:
    found = run("vision-effnet-lite0", tmp_path / "run")
    rows = {row.step: row for row in found.ledger.rows}
    assert rows["int8"].size_mib < 0.3 * rows["load"].size_mib
    assert found.ledger.program is not None
    assert found.ledger.program.size_mib < 5
    assert found.ledger.program.delegated_macs_pct > 99


def test_language_model(tmp_path: Path) -> None:
    found = run("lm-smollm2", tmp_path / "lm", **{"model.layers": 1})
    rows = {row.step: row for row in found.ledger.rows}
    assert rows["train"].trainable_parameters < 0.01 * rows["load"].parameters
    program = found.ledger.program
    assert program is not None
    assert program.size_mib < 0.3 * rows["load"].size_mib  # head and table are 8 bits, which both read
    trained, final = rows["train"].quality, rows["int4"].quality
    assert trained is not None
    assert final is not None
    assert trained.metric == "perplexity"
    assert final.value == pytest.approx(trained.value, rel=0.02)  # 4 bits with the zero points that it came with
    assert program.parity is not None
    assert (program.parity.rows, program.parity.counted) == (2 * 32, "greedy token")
    calls = ["a token after 64", "64 tokens of a prompt"]
    assert [m.call for m in found.ledger.measured] == calls
    assert [p.call for p in found.ledger.predicted if p.device == "pixel-8"] == calls
    assert {path.name for path in found.folder.iterdir()} >= {"model.pte", "model.json", "model.tokenizer.json"}
    said = generate(found.program, "Hello", max_tokens=4)
    assert said.stopped in ("length", "end")
    assert said.prompt_tokens > 5, "a chat template is around it"


def test_a_cache_that_the_model_has_no_room_for_is_found_before_any_training(tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match="at most as many as the model") as caught, silence_libraries():
        pipeline.run("lm-smollm2", {"variant": "smoke", "export.max_tokens": 9000}, out=tmp_path / "lm")
    assert caught.value.got == 9000
    assert not (tmp_path / "lm" / "ledger.json").exists()


def test_changed_data_are_not_resumed(tmp_path: Path) -> None:
    rows = [f"{'good' if n % 2 else 'bad'} text number {n},{n % 2}" for n in range(60)]
    table = tmp_path / "rows.csv"
    table.write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    steps = "[sparse-update, {train: {updates: 2}}]"
    text = f"name: mine\nmodel: minilm\ndata: 'csv:{table}'\nsteps: {steps}\n"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")

    def stop(what: str, done: int, of: int, detail: str) -> None:
        if what.endswith("train"):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        pipeline.run(tmp_path / "mine.yaml", out=tmp_path / "run", progress=stop)
    table.write_text("\n".join(["text,label", *rows[:-1], "another text,1"]), encoding="utf-8")
    with pytest.raises(EdgetuneError, match="the data has changed after the run started") as caught:
        pipeline.run(tmp_path / "mine.yaml", out=tmp_path / "run", resume=True)
    assert caught.value.exit_code == 3
