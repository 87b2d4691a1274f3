"""The face of the command line: quick to answer, verbs in order and uncut, completed by the shells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import edgetune as et
from edgetune.cli import complete, main
from edgetune.export.targets import TARGETS
from edgetune.profile import device
from edgetune.recipe import recipe

ROOT = Path(__file__).resolve().parents[1]


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def edgetune(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("edgetune")), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}, cwd=ROOT / "tests"
    )


HEAVY = ("torch", "numpy", "yaml", "rich", "transformers", "executorch", "edgetune.core.technique")


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["run", "--help"], ["devices", "compare", "--help"]])
def test_version_and_help_import_nothing_heavy(arguments: list[str]) -> None:
    code = f"import sys; from edgetune.cli import main; main.main({arguments!r})"
    assert python(f"{code}; print([name for name in {HEAVY} if name in sys.modules])").splitlines()[-1] == "[]"


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "edgetune", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == et.__version__ + "\n"


def test_every_public_name_is_there_and_stays_the_function() -> None:
    code = """
import edgetune.export.lower, edgetune.profile.device, edgetune.run.fold, edgetune as et
from edgetune import export, profile, recipe
assert all(hasattr(et, name) for name in et.__all__) and set(et.__all__) <= set(dir(et))
assert et.export is export and et.profile is profile and callable(export) and callable(profile)
assert et.export.__name__ == "export" and et.run.__name__ == "run" and recipe.__name__ == "edgetune.recipe"
assert not hasattr(et, "nothing")
"""
    assert python(code) == ""


def test_verbs_stand_in_the_order_of_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--help"]) == 0
    out = capsys.readouterr().out
    shown = [line.split()[0] for line in out.partition("Commands:\n")[2].splitlines()]
    assert shown == [verb for verb in main.VERBS if verb in shown]
    assert shown[:2] + shown[-1:] == ["recipes", "run", "env"]


@pytest.mark.parametrize("group", [[], ["recipes"], ["devices"]])
def test_no_help_text_is_cut_at_80_columns(
    group: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main.main([*group, "--help"]) == 0
    out = capsys.readouterr().out
    assert "..." not in out.replace("[ARGS]...", "")
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["export", "minilm", "--kit", "linux"], "--kit"),
        (["export", "minilm", "--lint"], "--lint"),
        (["export", "text-minilm", "--train"], "--train"),
        (["lint", "minilm", "--language"], "--language"),
        (["lint", "minilm", "--ptd"], "--ptd"),
        (["export-training", "text-minilm", "--device", "pixel-8"], "--device"),
    ],
)
def test_each_verb_has_only_the_options_that_mean_something(
    arguments: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(arguments) == 2
    assert f"No such option: {option}" in capsys.readouterr().err


# Completion


def test_names_of_completion_are_the_real_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert complete.recipe_names("") == list(recipe.packaged_recipes())
    (tmp_path / "text-mine.yaml").touch()
    packaged = [name for name in recipe.packaged_recipes() if name.startswith("text-")]
    assert complete.recipe_names("text-") == [*packaged, "text-mine.yaml"]
    device.user_folder().mkdir(parents=True)
    (device.user_folder() / "pixel-99.yaml").touch()
    assert complete.device_names("") == list(device.device_ids())
    assert "pixel-99" in complete.device_names("pixel-9")
    assert complete.target_names("") == list(TARGETS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_entry_point_completes(shell: str) -> None:
    script = edgetune("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1").stdout
    assert "_EDGETUNE_COMPLETE" in script
    for line, expected in {"edgetune exp": "export-training", "edgetune run text-": "text-minilm"}.items():
        words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        asked = {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        answer = edgetune(_EDGETUNE_COMPLETE=f"complete_{shell}", **(words if shell == "bash" else asked))
        assert (answer.returncode, answer.stderr) == (0, "")
        assert expected in answer.stdout


def test_bash_completes_in_a_shell() -> None:
    script = edgetune("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1").stdout
    ask = "COMP_WORDS=(edgetune profile m.pte --device jetson-orin-nano-s); COMP_CWORD=4; _edgetune_completion edgetune"
    bash = f'PATH={Path(sys.executable).parent}:$PATH\n{script}\n{ask}\necho "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", bash], capture_output=True, text=True, check=True)
    assert done.stdout == "jetson-orin-nano-super\n"
