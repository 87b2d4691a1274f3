"""Kits: every file is there and filled, the Python sample answers as the model does, the C++ one makes its inputs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgetune.cli import complete, main
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.quiet import silence_libraries
from edgetune.export import Artifact
from edgetune.export.kit import PLATFORMS, check, find, kit_of, target_for
from edgetune.export.kit.platforms import platform_of
from edgetune.models.metadata import describe_io
from edgetune.models.preprocessing import text_preprocessing
from edgetune.profile import device
from edgetune.program.carried import Carried, write_tokenizer
from support.programs import TOKENS, Small, run_sample

with silence_libraries():
    from tokenizers import Tokenizer, models, pre_tokenizers


def files_of(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


MODEL = {"model.pte", "model.json", "model.md"}
KOTLIN = "src/main/java/org/edgetune/kit"
SWIFT = "Sources/EdgetuneKit"
EXPECTED: dict[str, tuple[str, set[str], set[str], set[str]]] = {
    "android": (
        "src/main/assets/",
        {"README.md", "build.gradle.kts", f"{KOTLIN}/Model.kt", f"{KOTLIN}/Scores.kt"},
        {f"{KOTLIN}/Text.kt", f"{KOTLIN}/TextModel.kt"},
        {f"{KOTLIN}/Picture.kt", f"{KOTLIN}/PictureModel.kt"},
    ),
    "ios": (
        f"{SWIFT}/Resources/",
        {"README.md", "Package.swift", f"{SWIFT}/Model.swift"},
        {f"{SWIFT}/Text.swift"},
        {f"{SWIFT}/Picture.swift"},
    ),
}
for name in ("linux", "jetson"):
    always = {"README.md", "sample.py", "requirements.txt", "cpp/CMakeLists.txt", "cpp/main.cpp", "cpp/spec.hpp"}
    EXPECTED[name] = ("", always, {"cpp/text.hpp", "cpp/vocab.txt"}, {"cpp/picture.hpp"})


@pytest.mark.parametrize("kind", ["text", "picture"])
@pytest.mark.parametrize("name", list(PLATFORMS))
def test_a_kit_has_all_its_parts_and_nothing_to_fill_in(
    name: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    made: Small = request.getfixturevalue(f"{kind}_program")
    artifact = made[2]
    folder = kit_of(artifact.path, find(name), tmp_path / "kit")
    where, always, with_text, with_picture = EXPECTED[name]
    own = MODEL | ({"model.tokenizer.json"} if kind == "text" else set())
    parts = with_text if kind == "text" else with_picture
    assert files_of(folder) == {where + file for file in own} | always | parts
    assert Artifact.load(folder / where / "model.pte").manifest == artifact.manifest
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for told in (artifact.manifest.versions["executorch"], "Verification", "the same\nprediction", *own):
        assert told.replace("\n", " ") in readme.replace("\n", " ")
    for file in always | parts:
        if not file.endswith((".kt", ".py", ".swift")):
            source = (folder / file).read_text(encoding="utf-8")
            assert set(re.findall(r"\$\{?[a-z_.]+", source)) <= {"${best.label", "${best.score"}, "Kotlin's own"
    assert "$title" not in readme
    assert not list(tmp_path.glob(".kit-*")), "nothing half-made is left"


def test_a_kit_of_a_program_that_talks(talking: Artifact, tmp_path: Path) -> None:
    own = MODEL | {"model.tokenizer.json", "chat.json"}
    for name, sources in {
        "linux": {"generate.py", "requirements.txt"},
        "android": {"build.gradle.kts", f"{KOTLIN}/Generator.kt"},
        "ios": {"Package.swift", f"{SWIFT}/Generator.swift"},
    }.items():
        folder = kit_of(talking.path, find(name), tmp_path / name)
        assert files_of(folder) == {EXPECTED[name][0] + file for file in own} | sources | {"README.md"}
        if name != "linux":
            readme = " ".join((folder / "README.md").read_text(encoding="utf-8").split())
            assert f"have at most {talking.language.max_tokens} tokens" in readme


def test_the_packages_of_a_kit_fit_its_target(text_program: Small, tmp_path: Path) -> None:
    path = text_program[2].path
    version = text_program[2].manifest.versions["executorch"]
    gradle = (kit_of(path, find("android"), tmp_path / "a") / "build.gradle.kts").read_text(encoding="utf-8")
    assert f'implementation("org.pytorch:executorch-android:{version}")' in gradle
    package = (kit_of(path, find("ios"), tmp_path / "i") / "Package.swift").read_text(encoding="utf-8")
    assert f'branch: "swiftpm-{version}"' in package
    assert package.count(".product(") == 4
    assert '.product(name: "backend_xnnpack", package: "executorch"),' in package
    for name in ("model.pte", "model.json", "model.md", "model.tokenizer.json"):
        assert f'.copy("Resources/{name}")' in package
    required = (kit_of(path, find("linux"), tmp_path / "l") / "requirements.txt").read_text(encoding="utf-8").split()
    assert {f"executorch=={version}", "tokenizers>=0.21"} <= set(required)


def test_a_program_that_was_not_run_says_so_and_links_its_backend(picture_program: Small, tmp_path: Path) -> None:
    note = "lowered, not run: this machine has no such runtime"
    known = picture_program[2].manifest.carried
    for name, target, package in (
        ("android", "vulkan", "org.pytorch:executorch-android-vulkan:"),
        ("ios", "coreml", '.product(name: "backend_coreml"'),
    ):
        (tmp_path / name).mkdir()
        path = carry_other(picture_program, tmp_path / name, known, parity=False, target=target, note=note)
        folder = kit_of(path, find(name), tmp_path / f"{name}-kit")
        assert f"The program was {note}." in (folder / "README.md").read_text(encoding="utf-8")
        build = {"android": "build.gradle.kts", "ios": "Package.swift"}[name]
        assert package in (folder / build).read_text(encoding="utf-8")
        with pytest.raises(EdgetuneError, match="do not run this target"):
            kit_of(path, find("linux"), tmp_path / "kit")


# Refusals


def test_targets_are_those_that_the_platforms_packages_run() -> None:
    def chosen(name: str, device_id: str | None = None, target: str | None = None) -> str:
        return target_for(find(name), device_id, target)

    assert chosen("android") == chosen("ios") == chosen("linux") == "xnnpack"
    assert chosen("android", "galaxy-s24", "vulkan") == "vulkan"
    assert chosen("ios", target="coreml") == "coreml"
    for known in device.device_ids():
        found = device.load(known)
        if found.family == "microcontroller" or (found.family == "computer" and "coreml" in found.targets):
            with pytest.raises(EdgetuneError, match="there is no kit"):
                chosen("linux", known)
            continue
        name = platform_of(found.family, found.targets)
        assert chosen(name, known) in PLATFORMS[name].targets
    assert chosen("linux", "raspberry-pi-5") == "xnnpack"
    with pytest.raises(EdgetuneError, match="not a device for this kit") as caught:
        chosen("ios", "pixel-8")
    assert caught.value.allowed == ("android",)
    with pytest.raises(EdgetuneError, match="do not run this target") as caught:
        chosen("android", target="coreml")
    assert caught.value.exit_code == Exit.EXPORT
    with pytest.raises(EdgetuneError, match="unknown kit"):
        find("androd")


def carry_other(made: Small, folder: Path, known: Carried | None, parity: bool = True, **changes: object) -> Path:
    """The same program, with a manifest that carries something else."""
    artifact = made[2]
    path = folder / "model.pte"
    shutil.copyfile(artifact.path, path)
    beside = write_tokenizer(known, path) if known is not None else None
    calls = artifact.manifest.calls
    calls = calls if parity else tuple(call.model_copy(update={"parity": None}) for call in calls)
    manifest = artifact.manifest.model_copy(update={"carried": beside, "calls": calls, **changes})
    path.with_suffix(".json").write_text(manifest.model_dump_json(), encoding="utf-8")
    return path


def test_programs_that_carry_nothing_make_no_kit(picture_program: Small, tmp_path: Path) -> None:
    path = carry_other(picture_program, tmp_path, None)
    with pytest.raises(EdgetuneError, match="no preprocessing and no classes") as caught:
        kit_of(path, find("linux"), tmp_path / "kit")
    assert caught.value.exit_code == Exit.EXPORT
    assert files_of(tmp_path) == {"model.pte", "model.json"}


def test_what_is_carried_must_fit_the_program(picture_program: Small, tmp_path: Path) -> None:
    known = picture_program[2].manifest.carried
    assert known is not None
    assert known.preprocessing is not None
    larger = known.preprocessing.model_copy(update={"size_px": 64})
    for wrong in ({"preprocessing": larger}, {"labels": ("one",)}):
        path = carry_other(picture_program, tmp_path, known.model_copy(update=wrong))
        with pytest.raises(EdgetuneError, match="do not match its metadata"):
            kit_of(path, find("linux"), tmp_path / "kit")
    assert not (tmp_path / "kit").exists()


def test_a_folder_with_something_in_it_is_left_alone(text_program: Small, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(EdgetuneError, match="already exists"):
        kit_of(text_program[2].path, find("linux"), tmp_path)
    assert files_of(tmp_path) == {"mine.txt"}


def test_another_tokenizer_goes_to_python_alone(text_program: Small, tmp_path: Path) -> None:
    loaded, dataset, _ = text_program
    words = {"[PAD]": 0, "[UNK]": 1, **{char: i + 2 for i, char in enumerate("abcdefghijklmnopqrstuvwxyz")}}
    plain = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.enable_padding(pad_id=0)
    known = describe_io(loaded, dataset).model_copy(update={"preprocessing": text_preprocessing(plain, TOKENS)})
    with pytest.raises(EdgetuneError, match="BERT family"):
        check(find("android"), known)
    folder = kit_of(carry_other(text_program, tmp_path, known), find("linux"), tmp_path / "kit")
    assert not [file for file in files_of(folder) if file.startswith("cpp")]
    assert "No C++ sample" in (folder / "README.md").read_text(encoding="utf-8")
    (found,) = run_sample(folder, ["abc"])["rows"]
    assert found["inputs"]["input_ids"][0] == [2, 3, 4] + [0] * (TOKENS - 3)


def test_a_tampered_tokenizer_makes_no_kit(text_program: Small, tmp_path: Path) -> None:
    for file in text_program[2].path.parent.glob("model.*"):
        shutil.copyfile(file, tmp_path / file.name)
    (tmp_path / "model.tokenizer.json").write_text("{}")
    with pytest.raises(EdgetuneError, match="not the one that its manifest describes"):
        kit_of(tmp_path / "model.pte", find("linux"), tmp_path / "kit")
    assert not (tmp_path / "kit").exists()


# The command


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)

    def said(*arguments: str) -> tuple[int, str, str]:
        code = main.main([*arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return said


def test_the_command_makes_a_kit_of_a_program(text_program: Small, say: Callable[..., Any]) -> None:
    code, out, err = say("kit", str(text_program[2].path), "android")
    assert (code, err) == (0, "")
    assert out.startswith("kit-android: start with README.md\n  README.md\n")
    assert files_of(Path("kit-android")) == {line.strip() for line in out.splitlines()[1:]}
    code, out, _ = say("kit", str(text_program[2].path), "linux", "-o", "here", "--json")
    assert (code, json.loads(out)["folder"]) == (0, "here")


def test_the_command_refuses_before_any_work(text_program: Small, say: Callable[..., Any]) -> None:
    for arguments, told in {
        ("minilm", "androd"): "did you mean 'android'?",
        ("minilm", "android", "--target", "coreml"): "do not run this target",
        ("minilm", "ios", "--device", "pixel-8"): "not a device for this kit",
        (str(text_program[2].path), "linux", "--target", "xnnpack"): "the program is already lowered",
        ("minilm", "linux", "--dynamic", "batch=1:8"): "No such option: --dynamic",
        ("minilm",): "Missing argument 'PLATFORM'",
    }.items():
        code, out, err = say("kit", *arguments)
        assert (code in (2, 5), out) == (True, ""), arguments
        assert told in err
    assert list(Path().iterdir()) == []


def test_the_shell_completes_every_platform() -> None:
    assert set(complete.PLATFORMS) == set(PLATFORMS)
