"""The golden recipes from end to end, in their smoke variant: real models, real data, a real program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgetune import pipeline, recipe
from edgetune.ledger import Ledger
from edgetune.pipeline import Run
from edgetune.quiet import quiet
from edgetune.technique import EdgetuneError

FIGURES = ("parameters", "trainable_parameters", "size_mib", "macs", "backward_kept_mib")
SMALL = {
    "steps": [{"lora": {"targets": ["*.query"]}}, {"train": {"updates": 6, "batch_size": 4, "checkpoint_every": 2}}],
    "export": None,
    "profile": None,
    "budget": [],
    "variants": {},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run("text-minilm", tmp_path_factory.mktemp("text") / "run")


def run(name: str, folder: Path) -> Run:
    with quiet():
        return pipeline.run(name, {"variant": "smoke"}, out=folder)


def steps_of(found: Run) -> list[str]:
    return [row.step for row in found.ledger.rows]


def test_text(text: Run) -> None:
    rows = {row.step: row for row in text.ledger.rows}
    assert steps_of(text)[:5] == ["load", "sparse-update", "lora", "train", "finalize"]
    assert steps_of(text)[-1] == "int4"
    # every step does what it is for
    assert rows["sparse-update"].backward_kept_mib < 0.5 * rows["load"].backward_kept_mib
    assert rows["sparse-update"].trainable_parameters < 0.3 * rows["load"].trainable_parameters
    assert rows["prune"].macs < 0.75 * rows["load"].macs
    assert rows["prune"].parameters < rows["load"].parameters
    assert rows["int4"].size_mib < 0.25 * rows["load"].size_mib
    assert all(row.quality is not None and row.quality.rows == 128 for row in text.ledger.rows)
    assert [b.name for b in text.ledger.baselines] == ["always negative", "TF-IDF + logistic regression"]
    program = text.ledger.program
    assert program is not None
    assert program.parity is not None
    assert program.parity.same_prediction_pct >= 99
    assert program.delegated_macs_pct > 99
    assert program.size_mib < 19
    assert {p.device for p in text.ledger.predicted} >= {"pixel-8", "galaxy-s24", "raspberry-pi-5", "jetson-orin-nano"}
    assert [m.device for m in text.ledger.measured] == ["this host"]


def test_the_folder_of_a_run(text: Run) -> None:
    names = {path.name for path in text.folder.iterdir()}
    assert {"recipe.yaml", "environment.json", "ledger.json", "report.html", "model.pte", "model.json"} <= names
    assert not [name for name in names if name.startswith(".")]  # nothing half-written
    assert (text.folder / "adapter" / "adapter_model.safetensors").is_file()
    assert Ledger.read(text.folder / "ledger.json") == text.ledger
    assert recipe.load(text.folder / "recipe.yaml").digest == recipe.load("text-minilm", {"variant": "smoke"}).digest
    assert json.loads((text.folder / "model.json").read_text())["sha256"] == text.ledger.program.sha256


def test_a_finished_run_is_restored_and_not_resumed(text: Run) -> None:
    with quiet():
        restored = pipeline.restore(text.folder)
    last = text.ledger.rows[-1]
    assert {name: getattr(last, name) for name in ("parameters",)} == {
        "parameters": sum(p.numel() for p in restored.model.parameters())
    }
    assert len(restored.check_inputs) == text.ledger.program.parity.rows
    with pytest.raises(EdgetuneError, match="the run is finished"):
        pipeline.run("text-minilm", {"variant": "smoke"}, out=text.folder, resume=True)


def test_a_budget_that_does_not_hold(tmp_path: Path) -> None:
    changes = {**SMALL_DATA, **flat(SMALL), "budget": [{"device": "pixel-8", "train_memory_mib": 50}]}
    found = pipeline.run("text-minilm", changes, out=tmp_path / "run")
    (missed,) = found.missed
    assert missed.quantity == "train_memory_mib"
    assert missed.value > missed.least > 50


SMALL_DATA = {"model.max_length": 16, "data.train_rows": 32, "data.validation_rows": 16, "data.test_rows": 16}


def flat(changes: dict[str, object]) -> dict[str, object]:
    """As overrides."""
    return dict(changes)


def test_killed_and_resumed_is_the_same_run(tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch, then --resume: every figure and every weight as in a run left alone."""
    changes = {**SMALL_DATA, **SMALL}
    whole = pipeline.run("text-minilm", changes, out=tmp_path / "whole")
    folder = tmp_path / "killed"
    script = f"""
import os, signal, sys
from edgetune import pipeline

def kill(what, done, of, detail):
    if what.endswith("train") and done == 5:
        os.kill(os.getpid(), signal.SIGKILL)

import torch
torch.set_num_threads(1)
pipeline.run("text-minilm", {changes!r}, out={str(folder)!r}, progress=kill)
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ})
    assert child.returncode == -signal.SIGKILL, child.stderr
    resumed = pipeline.run("text-minilm", changes, out=folder, resume=True)
    assert resumed.ledger.trainings[0].losses == whole.ledger.trainings[0].losses
    for a, b in zip(whole.ledger.rows, resumed.ledger.rows, strict=True):
        assert [getattr(a, f) for f in (*FIGURES, "quality")] == [getattr(b, f) for f in (*FIGURES, "quality")]
    weights = [pipeline.restore(f).model.state_dict() for f in (tmp_path / "whole", folder)]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])


def test_vision(tmp_path: Path) -> None:
    found = run("vision-effnet-lite0", tmp_path / "run")
    rows = {row.step: row for row in found.ledger.rows}
    assert rows["int8"].size_mib < 0.3 * rows["load"].size_mib
    assert found.ledger.program is not None
    assert found.ledger.program.size_mib < 5
    assert found.ledger.program.delegated_macs_pct > 99


def test_language_model(tmp_path: Path) -> None:
    found = run("lm-smollm2", tmp_path / "run")
    rows = {row.step: row for row in found.ledger.rows}
    assert rows["nf4"].size_mib < 0.5 * rows["load"].size_mib
    assert rows["nf4"].macs == rows["load"].macs
    assert rows["train"].trainable_parameters < 0.01 * rows["load"].parameters
    assert found.ledger.program is not None
    assert found.ledger.program.size_mib < 0.25 * rows["load"].size_mib
    assert rows["train"].quality is not None
    assert rows["train"].quality.metric == "perplexity"
