"""`edgetune run`: the plan, what is passed on, a missed budget, and how to go on after Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgetune.core.ledger import Verdict
from edgetune.recipe import recipe
from edgetune.run import pipeline
from support.command_line import Answer, ledger


def test_an_interrupted_run_says_how_to_go_on(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, progress: Any, **__: object) -> None:
        progress("load", 0, 2, "tweets")
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", fail)
    answer = Answer(capsys, "run", "mine.yaml", "lora.targets=['*.query']", "--out", "a run")
    assert answer.code == 130
    command = "edgetune run mine.yaml 'lora.targets=['\"'\"'*.query'\"'\"']' --resume --out 'a run'"
    assert answer.err.splitlines()[-1] == f"edgetune: interrupted; continue with: {command}"


def test_ctrl_c_in_a_process() -> None:
    script = (
        "import signal, sys, threading; from edgetune.cli import main; from edgetune.run import pipeline\n"
        # a shell starts what runs in the background with Ctrl-C ignored, and children inherit that
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def wait(*_, **__): print('ready', file=sys.stderr, flush=True); threading.Event().wait(60)\n"
        "pipeline.run = wait; sys.exit(main.main(['run', 'mine.yaml']))"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    assert child.stderr.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "edgetune: interrupted\n")


def test_dry_run_prints_the_plan_and_writes_nothing(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(mine.parent.iterdir())
    answer = Answer(capsys, "run", "mine.yaml", "--dry-run", "train.learning_rate=2e-3")
    assert (answer.code, answer.err) == (0, "")
    assert (
        answer.out
        == """\
mine: minilm on tweets, seed 0
  1  lora      targets *.query, rank 4
  2  train     epochs 1, learning_rate 0.002
     finalize  lora; prune needs plain layers
  3  prune     ratio 0.5
     export    xnnpack
     verify    100 held-out rows, program compared with eager model
     profile   this host, measured, pixel-8
     budget    device pixel-8, size_mib 20
would write to runs/mine-NNN/: recipe.yaml, environment.json, digest.txt, checkpoints/, ledger.json, report.html, \
model.pte, model.json, model.md, model.tokenizer.json
"""
    )
    assert sorted(mine.parent.iterdir()) == before


def test_dry_run_as_json(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = Answer(capsys, "run", "mine.yaml", "--dry-run", "--json", "--out", "here")
    assert answer.json["digest"] == recipe.load(mine).digest
    assert answer.json["folder"] == "here"
    assert [p["step"] for p in answer.json["plan"]] == [1, 2, None, 3, None, None, None, None]


def test_dry_run_loads_no_model_library(mine: Path) -> None:
    script = (
        "import sys; from edgetune.cli.main import main; assert main(['run', 'mine.yaml', '--dry-run']) == 0;"
        "found = {'transformers', 'executorch', 'bitsandbytes', 'plotly'} & set(sys.modules); assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_run_passes_everything_on(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def note(what: str, **given: Any) -> pipeline.Run:
        given["progress"]("train", 1, 2, "loss 0.5")
        print("noise of a library")
        seen.update(given, recipe=what)
        return pipeline.Run(Path("runs/mine-001"), ledger())

    monkeypatch.setattr(pipeline, "run", note)
    answer = Answer(capsys, "run", "mine.yaml", "train.epochs=2", "--resume", "--out", "there", "--json")
    assert answer.code == 0
    assert answer.json["folder"] == "runs/mine-001"
    assert answer.json["rows"][0]["step"] == "load"
    assert answer.err == "train 1/2 loss 0.5\nnoise of a library\n"
    del seen["progress"]
    assert seen == {
        "recipe": "mine.yaml", "overrides": {"train.epochs": 2}, "resume": True, "out": Path("there"),
        "from_step": None, "until_step": None,
    }  # fmt: skip
    part = Answer(capsys, "run", "mine.yaml", "seed=1", "--from", "2", "--until", "train")
    assert (seen["from_step"], seen["until_step"]) == ("2", "train")
    assert "after step train; continue with: edgetune run mine.yaml seed=1 --resume --out runs/mine-001\n" in part.err
    assert "report.html" not in part.out
    text = Answer(capsys, "run", "mine.yaml")
    assert text.code == 0
    assert text.out.endswith("report: runs/mine-001/report.html\n")


def test_a_missed_budget_is_exit_code_4(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts = (
        Verdict(device="pixel-8", quantity="size_mib", limit=5, value=7.25, least=6.5, holds=False),
        Verdict(device="pixel-8", quantity="latency_ms", limit=5, value=3, least=3, holds=True),
    )
    found = pipeline.Run(mine.parent, ledger(verdicts=verdicts))
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: found)
    answer = Answer(capsys, "run", "mine.yaml")
    assert answer.code == 4
    assert answer.err.splitlines()[-1] == (
        "edgetune: the budget for pixel-8 is not met: size_mib is 7.25, the limit is 5, the lowest reachable value 6.5"
    )
