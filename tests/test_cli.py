"""The command line: every verb answers, exit codes, plain errors, JSON alone on stdout."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from edgetune.cli.main import main
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.ledger import Ledger, Row, Verdict
from edgetune.profile import device
from edgetune.recipe import recipe
from edgetune.recipe.schema import build_schema
from edgetune.run import pipeline
from edgetune.run.environment import Environment, format_environment

VERBS = [
    "run",
    "export",
    "kit",
    "lint",
    "inspect",
    "generate",
    "predict",
    "eval",
    "profile",
    "export-training",
    "train-pte",
    "pull",
    "report",
    "env",
    "recipes",
    "recipes list",
    "recipes show",
    "recipes copy",
    "recipes validate",
    "recipes schema",
    "devices",
    "devices list",
    "devices show",
    "devices add",
    "devices validate",
    "devices calibrate",
    "devices compare",
]
RECIPE = """\
name: mine
model: minilm
data: {source: tweets, train_rows: 64}
steps:
  - lora: {rank: 4, targets: ["*.query"]}
  - train: {learning_rate: 1e-3}
  - prune: {ratio: 0.5}
export: {target: xnnpack, check_rows: 100}
profile: {devices: [pixel-8]}
budget: {device: pixel-8, size_mib: 20}
"""


class Answer:
    """What one call of the command line gave."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        self.code = main(arguments)
        self.out, self.err = capsys.readouterr()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


def ledger(**changes: Any) -> Ledger:
    row = Row(index=0, step="load", parameters=10, trainable_parameters=10, size_mib=1.0, seconds=0.5)
    plain = Ledger(recipe="mine", seed=0, model="m", data="d", settings={}, environment={}, rows=(row,))
    return plain.with_(**changes)


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgetune.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_answers(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = Answer(capsys, *verb.split(), "--help")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.startswith(f"Usage: edgetune {verb} ")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    answer = Answer(capsys, "--version")
    assert (answer.code, answer.out) == (0, metadata.version("edgetune") + "\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("nope", "edgetune: No such command 'nope'.\n  next: edgetune --help\n"),
        ("run", "edgetune: Missing argument 'RECIPE'.\n  next: edgetune run --help\n"),
        ("recipes nope", "edgetune: No such command 'nope'.\n  next: edgetune recipes --help\n"),
        ("profile x.pte", "edgetune: Missing option '--device'.\n  next: edgetune profile --help\n"),
    ],
)
def test_usage_errors(arguments: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = Answer(capsys, *arguments.split())
    assert (answer.code, answer.out, answer.err) == (2, "", text)


def test_no_verb_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    answer = Answer(capsys)
    assert answer.code == 2
    assert "Usage: edgetune" in answer.err + answer.out


# Errors and exit codes


@pytest.mark.parametrize("code", [Exit.USAGE, Exit.DATA, Exit.BUDGET, Exit.EXPORT])
def test_an_error_decides_the_exit_code(
    code: Exit, mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EdgetuneError("it failed", where="step 1", got=3, action="try 4", exit_code=code)

    monkeypatch.setattr(pipeline, "run", fail)
    answer = Answer(capsys, "run", str(mine))
    assert (answer.code, answer.out) == (int(code), "")
    assert answer.err == "edgetune: step 1: it failed: got 3\n  next: try 4\n"
    assert "Traceback" in Answer(capsys, "--debug", "run", str(mine)).err


def test_unexpected_errors(mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(pipeline, "run", fail)
    answer = Answer(capsys, "run", str(mine))
    assert answer.code == 1
    assert answer.err == "edgetune: RuntimeError: a bug\n  next: run again with --debug for the trace\n"
    answer = Answer(capsys, "run", str(mine), "--debug")
    assert answer.code == 1
    assert 'raise RuntimeError("a bug")' in answer.err


def test_interrupted(mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", fail)
    answer = Answer(capsys, "run", str(mine))
    assert (answer.code, answer.err) == (130, "edgetune: interrupted\n")


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


def test_processes_exit_as_the_function_says(mine: Path) -> None:
    assert process("--version").returncode == 0
    mine.write_text(RECIPE.replace("rank: 4", "rank: four"))
    bad = process("recipes", "validate", str(mine))
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == f"edgetune: {mine.name}, step 1 (line 5), lora.rank: must be a whole number: got 'four'\n"


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m edgetune.cli.main recipes schema | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{\n", "")


# run


def test_dry_run_prints_the_plan_and_writes_nothing(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(mine.parent.iterdir())
    answer = Answer(capsys, "run", "mine.yaml", "--dry-run", "train.learning_rate=2e-3")
    assert (answer.code, answer.err) == (0, "")
    assert (
        answer.out
        == """\
mine: minilm on tweets, seed 0
  1  lora      rank 4, targets *.query
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


# recipes


def test_recipes_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    listed = Answer(capsys, "recipes", "list")
    assert [line.split(":")[0] for line in listed.out.splitlines()] == list(recipe.packaged_recipes())
    assert [r["name"] for r in Answer(capsys, "recipes", "list", "--json").json] == list(recipe.packaged_recipes())
    shown = Answer(capsys, "recipes", "show", "text-minilm")
    assert shown.out == recipe.read_recipe_text("text-minilm")[0]
    resolved = Answer(capsys, "recipes", "show", "text-minilm", "seed=3", "--resolved")
    assert recipe.parse(resolved.out, "again.yaml") == recipe.load("text-minilm", {"seed": 3})


def test_recipes_copy_never_overwrites(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Answer(capsys, "recipes", "copy", "text-minilm").out == "text-minilm.yaml\n"
    copied = Path("text-minilm.yaml")
    assert recipe.load(copied) == recipe.load("text-minilm")
    copied.write_text("my own")
    again = Answer(capsys, "recipes", "copy", "text-minilm")
    assert (again.code, copied.read_text()) == (2, "my own")
    assert again.err == "edgetune: the file already exists: got 'text-minilm.yaml'\n  next: choose another name\n"
    assert Answer(capsys, "recipes", "copy", "text-minilm", "plain").code == 2
    assert not Path("plain").exists()
    assert Answer(capsys, "recipes", "copy", "text-minilm", "no/such/folder.yaml").code == 2


def test_recipes_validate(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Answer(capsys, "recipes", "validate", "mine.yaml").out == "mine: valid, 3 steps\n"
    mine.write_text(RECIPE.replace("rank: 4", "rnak: 4").replace("prune", "prun") + "sed: 1\n")
    bad = Answer(capsys, "recipes", "validate", "mine.yaml")
    assert (bad.code, bad.out) == (2, "")
    assert bad.err.startswith("edgetune: mine.yaml: 3 errors:\nmine.yaml, step 1 (line 5), lora.rnak: unknown field")
    assert "did you mean 'prune'?" in bad.err
    found = Answer(capsys, "recipes", "validate", "mine.yaml", "--json")
    assert (found.code, found.json["valid"], found.err) == (2, False, "")
    assert [e["got"] for e in found.json["errors"]] == ["rnak", "prun", "sed"]


def test_recipes_validate_looks_into_variants(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine.write_text(RECIPE + "variants: {quick: {lora.rank: none at all}}\n")
    answer = Answer(capsys, "recipes", "validate", "mine.yaml")
    assert answer.code == 2
    assert "step 1 (variant quick: lora.rank=none at all), lora.rank: must be a whole number" in answer.err


def test_recipes_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert Answer(capsys, "recipes", "schema").json == build_schema()


# devices, env, report, profile, export


def test_devices(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = Answer(capsys, "devices", "list")
    rows = [line for line in listed.out.splitlines()[1:] if line.startswith("  ")]
    assert sorted(line.split()[0] for line in rows) == sorted(device.device_ids())
    assert {item["id"] for item in Answer(capsys, "devices", "list", "--json").json} == set(device.device_ids())
    shown = Answer(capsys, "devices", "show", "pixel-8", "--json")
    assert shown.json["id"] == "pixel-8"
    assert "Google Tensor G3 specification pages" in Answer(capsys, "devices", "show", "pixel-8").out
    answer = Answer(capsys, "devices", "validate").out
    assert answer.startswith(f"valid: {', '.join(device.device_ids())}\n")
    assert "oneplus-12 llama-3.2-1b bf16 decode: 19.2 tokens/s | " in answer
    unknown = Answer(capsys, "devices", "show", "pixel8")
    assert unknown.code == 2
    assert "did you mean 'pixel-8'?" in unknown.err
    Path("broken.yaml").write_text("id: broken\n")
    broken = Answer(capsys, "devices", "validate", "pixel-8", "broken.yaml")
    assert broken.code == 2
    assert "broken.yaml" in broken.err


def test_env(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = Answer(capsys, "env", "--json").json
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["cores"] >= 1
    assert found["memory_mib"] > 0
    assert found["host_calibrated"] is False
    assert "peft" not in found["extras"]["lora"]
    assert found["targets"]["xnnpack"] == "lowers and runs here"
    text = format_environment(Environment.model_validate(found))
    assert f"torch {metadata.version('torch')}" in text
    assert "not calibrated" in text


def test_report(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Answer(capsys, "report", "nowhere").code == 2
    folder = Path("done")
    folder.mkdir()
    missing = Answer(capsys, "report", "done")
    assert missing.code == 2
    assert "ledger.json" in missing.err
    (folder / "ledger.json").write_text(ledger().dumps())
    answer = Answer(capsys, "report", "done")
    assert answer.code == 0
    assert answer.out.endswith("report: done/report.html\n")
    assert (folder / "report.html").read_text().lstrip().lower().startswith("<!doctype html")
    assert Answer(capsys, "report", "done", "--json").json["recipe"] == "mine"


def test_profile_refuses_what_it_cannot_do(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = Answer(capsys, "profile", "none.pte", "--device", "pixel-8")
    assert missing.code in (2, 5)
    assert "none.pte" in missing.err
    remote = Answer(capsys, "profile", "none.pte", "--device", "pixel-8", "--on", "ssh://-oProxyCommand=id")
    assert remote.code == 2
    assert (
        "not a valid place to time a program: got 'ssh://-oProxyCommand=id'; allowed: host, ssh://user@host"
        in remote.err
    )


def test_export_says_what_it_takes(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unknown = Answer(capsys, "export", "minillm", "--device", "pixel-8")
    assert unknown.code == 2
    assert (
        "accepted are minilm, smollm2, effnet-lite0, hf:PATH, timm:NAME, py:FILE.py:FUNCTION, a run's folder"
        in unknown.err
    )
    assert "did you mean 'minilm'?" in unknown.err
    Path("folder").mkdir()
    assert "this folder does not contain a run" in Answer(capsys, "export", "folder").err
    Path("broken.pt2").write_bytes(b"nothing")
    broken = Answer(capsys, "export", "broken.pt2")
    assert broken.code == 2
    assert "save it with torch.export.save" in broken.err
    own = Answer(capsys, "export", "minilm", "--weights", "w.pt")
    assert "for models that are exported without data" in own.err
    assert list(mine.parent.glob("*.pte")) == []


def test_export_and_profile_of_a_saved_program(mine: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)).eval()
    torch.export.save(torch.export.export(net, (torch.randn(1, 8),)), "model.pt2")
    done = process("export", "model.pt2", "--device", "pixel-8", "-o", "small.pte", "--json")
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert (manifest["target"], manifest["calls"][0]["parity"]["same_prediction_pct"]) == ("xnnpack", 100)
    told = process("profile", "small.pte", "--device", "pixel-8", "--json")
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert (found["predicted"]["device"], found["measured"]) == ("pixel-8", None)
    told = process("profile", "small.pte", "--device", "pixel-8", "--on", "host", "--seconds", "0.01", "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["measured"]["latency_ms"] > 0
