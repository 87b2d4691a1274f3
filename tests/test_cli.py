"""The command line: every verb answers, exit codes, plain errors, JSON alone on stdout."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.profile import device
from edgetune.recipe import recipe
from edgetune.recipe.schema import build_schema
from edgetune.run import pipeline
from edgetune.run.environment import Environment, format_environment
from support.command_line import RECIPE, Answer, ledger, process

VERBS = [
    "run",
    "combine",
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


def test_export_and_profile_of_a_saved_program(mine: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """JSON alone on stdout, whatever the compiler and the runtime print from C++."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)).eval()
    torch.export.save(torch.export.export(net, (torch.randn(1, 8),)), "model.pt2")
    exported = Answer(capfd, "export", "model.pt2", "--device", "pixel-8", "-o", "small.pte", "--json")
    assert exported.code == 0, exported.err
    parity = exported.json["calls"][0]["parity"]
    assert (exported.json["target"], parity["same_prediction_pct"]) == ("xnnpack", 100)
    predicted = Answer(capfd, "profile", "small.pte", "--device", "pixel-8", "--json").json
    assert (predicted["predicted"]["device"], predicted["measured"]) == ("pixel-8", None)
    command = ("profile", "small.pte", "--device", "pixel-8", "--on", "host", "--seconds", "0.01", "--json")
    assert Answer(capfd, *command).json["measured"]["latency_ms"] > 0
