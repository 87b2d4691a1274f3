"""Kits: every file is there and filled, the Python sample answers as the model does, the C++ one makes its inputs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_carried import (
    HARD_TEXTS,
    ROOT,
    SAMPLE,
    STD,
    TOKENS,
    exported,
    photographs,
    same_as_the_model,
    sampled,
    small_bert,
    small_vision,
)

from edgetune.cli import complete, main
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.quiet import silence_libraries
from edgetune.data.dataset import Dataset
from edgetune.export import Artifact
from edgetune.export.kit import PLATFORMS, check, find, kit_of, target_for
from edgetune.export.kit.platforms import platform_of
from edgetune.models.loaded import LoadedModel
from edgetune.models.metadata import describe_io
from edgetune.models.preprocessing import text_preprocessing
from edgetune.profile import device
from edgetune.program.carried import Carried, TextPreprocessing, write_tokenizer

with silence_libraries():
    from PIL import Image, ImageOps
    from tokenizers import Tokenizer, models, pre_tokenizers

CLASSES = ("nein", 'vielleicht "ja"', "oui, é")  # quotes and accents, which a sample's source must survive
Made = tuple[LoadedModel, Dataset, Artifact]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Made:
    loaded, dataset = small_bert(CLASSES)
    return loaded, dataset, exported(loaded, dataset, tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("picture")
    loaded, dataset = small_vision(photographs(folder), CLASSES)
    return loaded, dataset, exported(loaded, dataset, folder)


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
    made: Made = request.getfixturevalue(kind)
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


def test_the_packages_of_a_kit_fit_its_target(text: Made, tmp_path: Path) -> None:
    path = text[2].path
    version = text[2].manifest.versions["executorch"]
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


def test_a_program_that_was_not_run_says_so_and_links_its_backend(picture: Made, tmp_path: Path) -> None:
    note = "lowered, not run: this machine has no such runtime"
    known = picture[2].manifest.carried
    for name, target, package in (
        ("android", "vulkan", "org.pytorch:executorch-android-vulkan:"),
        ("ios", "coreml", '.product(name: "backend_coreml"'),
    ):
        (tmp_path / name).mkdir()
        path = told_anew(picture, tmp_path / name, known, parity=False, target=target, note=note)
        folder = kit_of(path, find(name), tmp_path / f"{name}-kit")
        assert f"The program was {note}." in (folder / "README.md").read_text(encoding="utf-8")
        build = {"android": "build.gradle.kts", "ios": "Package.swift"}[name]
        assert package in (folder / build).read_text(encoding="utf-8")
        with pytest.raises(EdgetuneError, match="do not run this target"):
            kit_of(path, find("linux"), tmp_path / "kit")


def test_the_linux_sample_is_the_one_that_was_tried(picture: Made, tmp_path: Path) -> None:
    """`test_carried` runs it on raw rows and compares it with the model."""
    loaded, dataset, artifact = picture
    folder = kit_of(artifact.path, find("linux"), tmp_path / "kit")
    assert (folder / "sample.py").read_bytes() == SAMPLE.read_bytes()
    paths = list(dataset.test.inputs)
    same_as_the_model(sampled(folder, [str(p) for p in paths]), loaded.model, loaded.encode(paths), CLASSES)


def test_the_linux_sample_is_a_command(text: Made, tmp_path: Path) -> None:
    import sys

    folder = kit_of(text[2].path, find("jetson"), tmp_path / "kit")
    command = [sys.executable, str(folder / "sample.py"), "so good", "so bad"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    lines = done.stdout.splitlines()[-2:]
    assert [line.split(":")[0] for line in lines] == ["so good", "so bad"]
    assert all(label in line for line in lines for label in CLASSES)


# C++: what makes the inputs needs nothing of ExecuTorch, so it can be built and run here

TEXT_MAIN = """
#include <fstream>
#include <iostream>
#include "text.hpp"
int main(int, char** argv) {
  const kit::Tokenizer tokenizer(argv[1]);
  std::ifstream rows(argv[2], std::ios::binary);
  for (std::string row; std::getline(rows, row, '\\0');) {
    const auto [ids, mask] = kit::inputs(tokenizer, row);
    for (std::size_t i = 0; i < ids.size(); ++i) std::cout << (i ? " " : "") << ids[i] << ':' << mask[i];
    std::cout << '\\n';
  }
  for (const auto& label : kit::kLabels) std::cout << label << '\\n';
}
"""

PICTURE_MAIN = """
#include <iostream>
#include "picture.hpp"
int main(int count, char** argv) {
  for (int row = 1; row < count; ++row) {
    for (const float value : kit::inputs(kit::read(argv[row]))) std::cout << value << ' ';
    std::cout << '\\n';
  }
}
"""


def built(folder: Path, source: str) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (folder / "check.cpp").write_text(source, encoding="utf-8")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{folder / 'cpp'}"]
    command = [compiler, *flags, str(folder / "check.cpp"), "-o", str(folder / "check")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "check"


def test_the_cpp_sample_cuts_texts_as_the_tokenizer_does(text: Made, tmp_path: Path) -> None:
    loaded, dataset, artifact = text
    folder = kit_of(artifact.path, find("linux"), tmp_path / "kit")
    rows = [*map(str, dataset.test.inputs), *map(str, dataset.train.inputs), *HARD_TEXTS]
    (folder / "rows").write_bytes(b"".join(row.encode() + b"\0" for row in rows))
    command = [str(built(folder, TEXT_MAIN)), str(folder / "cpp" / "vocab.txt"), str(folder / "rows")]
    lines = subprocess.run(command, capture_output=True, check=True).stdout.decode().splitlines()
    inputs = loaded.encode(rows, TOKENS)
    assert isinstance(inputs, dict)
    for row, line, ids, mask in zip(rows, lines, inputs["input_ids"], inputs["attention_mask"], strict=False):
        assert line.split() == [f"{i}:{m}" for i, m in zip(ids.tolist(), mask.tolist(), strict=True)], row
    assert lines[len(rows) :] == list(CLASSES)


def test_the_cpp_sample_prepares_pictures_as_training_did(picture: Made, tmp_path: Path) -> None:
    loaded, dataset, artifact = picture
    folder = kit_of(artifact.path, find("linux"), tmp_path / "kit")
    plain = []
    for number, path in enumerate(dataset.test.inputs):
        upright = ImageOps.exif_transpose(Image.open(path))
        kept = upright.convert("L" if upright.mode == "L" else "RGB")
        name = folder / f"{number}.{'pgm' if kept.mode == 'L' else 'ppm'}"
        kept.save(name)
        plain.append(name)
    command = [str(built(folder, PICTURE_MAIN)), *map(str, plain)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    got = torch.tensor([[float(value) for value in line.split()] for line in lines])
    wanted = loaded.encode(plain)
    assert isinstance(wanted, torch.Tensor)
    # bytes are rounded after each of two passes, where halves fall either way: Pillow counts in fixed point
    apart = ((got - wanted.flatten(1)).abs() * torch.tensor(STD).repeat_interleave(32 * 32)).round()
    assert apart.max() <= 2
    assert (apart > 0).float().mean() < 0.02


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


def told_anew(made: Made, folder: Path, known: Carried | None, parity: bool = True, **changes: object) -> Path:
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


def test_programs_that_carry_nothing_make_no_kit(picture: Made, tmp_path: Path) -> None:
    path = told_anew(picture, tmp_path, None)
    with pytest.raises(EdgetuneError, match="no preprocessing and no classes") as caught:
        kit_of(path, find("linux"), tmp_path / "kit")
    assert caught.value.exit_code == Exit.EXPORT
    assert files_of(tmp_path) == {"model.pte", "model.json"}


def test_what_is_carried_must_fit_the_program(picture: Made, tmp_path: Path) -> None:
    known = picture[2].manifest.carried
    assert known is not None
    assert known.preprocessing is not None
    larger = known.preprocessing.model_copy(update={"size_px": 64})
    for wrong in ({"preprocessing": larger}, {"labels": ("one",)}):
        path = told_anew(picture, tmp_path, known.model_copy(update=wrong))
        with pytest.raises(EdgetuneError, match="do not match its metadata"):
            kit_of(path, find("linux"), tmp_path / "kit")
    assert not (tmp_path / "kit").exists()


def test_a_folder_with_something_in_it_is_left_alone(text: Made, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(EdgetuneError, match="already exists"):
        kit_of(text[2].path, find("linux"), tmp_path)
    assert files_of(tmp_path) == {"mine.txt"}


def test_another_tokenizer_goes_to_python_alone(text: Made, tmp_path: Path) -> None:
    loaded, dataset, _ = text
    words = {"[PAD]": 0, "[UNK]": 1, **{char: i + 2 for i, char in enumerate("abcdefghijklmnopqrstuvwxyz")}}
    plain = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.enable_padding(pad_id=0)
    known = describe_io(loaded, dataset).model_copy(update={"preprocessing": text_preprocessing(plain, TOKENS)})
    with pytest.raises(EdgetuneError, match="BERT family"):
        check(find("android"), known)
    folder = kit_of(told_anew(text, tmp_path, known), find("linux"), tmp_path / "kit")
    assert not [file for file in files_of(folder) if file.startswith("cpp")]
    assert "No C++ sample" in (folder / "README.md").read_text(encoding="utf-8")
    (found,) = sampled(folder, ["abc"])["rows"]
    assert found["inputs"]["input_ids"][0] == [2, 3, 4] + [0] * (TOKENS - 3)


def test_a_tampered_tokenizer_makes_no_kit(text: Made, tmp_path: Path) -> None:
    for file in text[2].path.parent.glob("model.*"):
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


def test_the_command_makes_a_kit_of_a_program(text: Made, say: Callable[..., Any]) -> None:
    code, out, err = say("kit", str(text[2].path), "android")
    assert (code, err) == (0, "")
    assert out.startswith("kit-android: start with README.md\n  README.md\n")
    assert files_of(Path("kit-android")) == {line.strip() for line in out.splitlines()[1:]}
    code, out, _ = say("kit", str(text[2].path), "linux", "-o", "here", "--json")
    assert (code, json.loads(out)["folder"]) == (0, "here")


def test_the_command_refuses_before_any_work(text: Made, say: Callable[..., Any]) -> None:
    for arguments, told in {
        ("minilm", "androd"): "did you mean 'android'?",
        ("minilm", "android", "--target", "coreml"): "do not run this target",
        ("minilm", "ios", "--device", "pixel-8"): "not a device for this kit",
        (str(text[2].path), "linux", "--target", "xnnpack"): "the program is already lowered",
        ("minilm", "linux", "--dynamic", "batch=1:8"): "No such option: --dynamic",
        ("minilm",): "Missing argument 'PLATFORM'",
    }.items():
        code, out, err = say("kit", *arguments)
        assert (code in (2, 5), out) == (True, ""), arguments
        assert told in err
    assert list(Path().iterdir()) == []


def test_the_shell_completes_every_platform() -> None:
    assert set(complete.PLATFORMS) == set(PLATFORMS)


def test_every_template_is_shipped() -> None:
    """Package data are named by pattern: a file that no pattern takes would be missing in the wheel."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (line,) = re.findall(r'^"edgetune\.export\.kit" = \[(.*)\]$', text, re.M)
    folder = ROOT / "export" / "kit"
    shipped = {file for pattern in re.findall(r'"([^"]+)"', line) for file in folder.glob(pattern)}
    here = {file for file in folder.glob("*/*") if "__pycache__" not in file.parts}
    assert shipped == here
    parts = [(*p.common, *p.text, *p.image, *p.generation) for p in PLATFORMS.values()]
    listed = {source for files in parts for source in files} | {"linux/cpp.md"}
    assert {str(file.relative_to(folder)) for file in here} == listed


# Text-generation programs


GENERATE = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from generate import Generator

generator = Generator(Path(sys.argv[1]) / "model.pte")
sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
print("".join(generator.answer(sys.argv[2], 12)), end="")
assert not {"edgetune", "transformers"} & set(sys.modules)
"""


def test_a_language_model_generates_from_its_kit(talking: Artifact, tmp_path: Path) -> None:
    import sys

    from edgetune.runtime.generating import generate

    folder = kit_of(talking.path, find("linux"), tmp_path / "kit")
    own = MODEL | {"model.tokenizer.json", "chat.json"}
    assert files_of(folder) == own | {"README.md", "generate.py", "requirements.txt"}
    message = "a small model talks"
    command = [sys.executable, "-c", GENERATE, str(folder), message]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    expected = generate(talking.path, message, max_tokens=12)
    assert len(expected.tokens) > 3
    said = done.stdout.decode()
    assert expected.text.startswith(said.rstrip("\ufffd")), "a character whose bytes never came is left out"
    assert len(said) > 0
    for name in ("android", "ios"):
        made = kit_of(talking.path, find(name), tmp_path / name)
        where = EXPECTED[name][0]
        sample = {"android": f"{KOTLIN}/Generator.kt", "ios": f"{SWIFT}/Generator.swift"}[name]
        build = {"android": "build.gradle.kts", "ios": "Package.swift"}[name]
        assert files_of(made) == {where + file for file in own} | {"README.md", build, sample}
        readme = " ".join((made / "README.md").read_text(encoding="utf-8").split())
        assert f"have at most {talking.language.max_tokens} tokens" in readme


@pytest.mark.slow
def test_the_whole_line_from_a_name_to_answers(tmp_path: Path) -> None:
    """MiniLM as it is loaded, with real tweets: the command, then the sample on the rows."""
    from edgetune.run.exporting import load_exportable

    assert main.main(["kit", "minilm", "linux", "-o", str(tmp_path / "kit")]) == 0
    known = json.loads((tmp_path / "kit" / "model.json").read_text(encoding="utf-8"))
    found = load_exportable("minilm")
    assert found.check_inputs is not None
    from edgetune.data.settings import DataSettings
    from edgetune.data.text import tweets

    rows = [str(row) for row in tweets("", DataSettings(source="tweets")).test.inputs[:40]]
    inputs: Any = {
        name: torch.cat([row[name] for row in found.check_inputs[:40]])  # type: ignore[call-overload, index]
        for name in ("input_ids", "attention_mask")
    }
    same_as_the_model(sampled(tmp_path / "kit", rows), found.model, inputs, known["carried"]["labels"])
    card = (tmp_path / "kit" / "model.md").read_text(encoding="utf-8")
    assert "nothing was trained" in card
    assert isinstance(found.carried and found.carried.preprocessing, TextPreprocessing)
    assert np.isfinite(known["calls"][0]["parity"]["max_abs_difference"])


@pytest.mark.slow
def test_the_whole_line_for_pictures(tmp_path: Path) -> None:
    """EfficientNet-Lite0 as it is loaded, with Fashion-MNIST's pictures in files."""
    from edgetune.data.settings import DataSettings
    from edgetune.data.vision import fashion_mnist
    from edgetune.run.exporting import load_exportable

    assert main.main(["kit", "effnet-lite0", "linux", "-o", str(tmp_path / "kit")]) == 0
    known = json.loads((tmp_path / "kit" / "model.json").read_text(encoding="utf-8"))
    found = load_exportable("effnet-lite0")
    assert found.check_inputs is not None
    data = fashion_mnist("", DataSettings(source="fashion-mnist"))
    paths = []
    for number, array in enumerate(np.asarray(data.test.inputs[:20])):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(array).save(paths[-1])
    rows: Any = torch.cat(list(found.check_inputs[:20]))  # type: ignore[arg-type]
    told = sampled(tmp_path / "kit", [str(path) for path in paths])
    same_as_the_model(told, found.model, rows, known["carried"]["labels"])
    assert known["carried"]["labels"] == list(data.classes)
