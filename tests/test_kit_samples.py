"""A kit's samples: the Python one answers as the model does, the C++ one makes its inputs, the one that talks talks."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgetune.cli import main
from edgetune.core.quiet import silence_libraries
from edgetune.export import Artifact
from edgetune.export.kit import copy_to_kit, find
from edgetune.program.carried import TextPreprocessing
from edgetune.runtime.generating import generate
from support.programs import CLASSES, HARD_TEXTS, SAMPLE, STD, TOKENS, Small, check_sample, run_sample

with silence_libraries():
    from PIL import Image, ImageOps


def test_the_linux_sample_is_the_one_that_was_tried(picture_program: Small, tmp_path: Path) -> None:
    """`test_carried` runs it on raw rows and compares it with the model."""
    loaded, dataset, artifact = picture_program
    folder = copy_to_kit(artifact.path, find("linux"), tmp_path / "kit")
    assert (folder / "sample.py").read_bytes() == SAMPLE.read_bytes()
    paths = list(dataset.test.inputs)
    check_sample(run_sample(folder, [str(p) for p in paths]), loaded.model, loaded.encode(paths), CLASSES)


def test_the_linux_sample_is_a_command(text_program: Small, tmp_path: Path) -> None:
    folder = copy_to_kit(text_program[2].path, find("jetson"), tmp_path / "kit")
    command = [sys.executable, str(folder / "sample.py"), "so good", "so bad"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    lines = done.stdout.splitlines()[-2:]
    assert [line.split(":")[0] for line in lines] == ["so good", "so bad"]
    assert all(label in line for line in lines for label in CLASSES)


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


def test_the_cpp_sample_cuts_texts_as_the_tokenizer_does(text_program: Small, tmp_path: Path) -> None:
    loaded, dataset, artifact = text_program
    folder = copy_to_kit(artifact.path, find("linux"), tmp_path / "kit")
    rows = [*map(str, dataset.test.inputs), *map(str, dataset.train.inputs), *HARD_TEXTS]
    (folder / "rows").write_bytes(b"".join(row.encode() + b"\0" for row in rows))
    command = [str(built(folder, TEXT_MAIN)), str(folder / "cpp" / "vocab.txt"), str(folder / "rows")]
    lines = subprocess.run(command, capture_output=True, check=True).stdout.decode().splitlines()
    inputs = loaded.encode(rows, TOKENS)
    assert isinstance(inputs, dict)
    for row, line, ids, mask in zip(rows, lines, inputs["input_ids"], inputs["attention_mask"], strict=False):
        assert line.split() == [f"{i}:{m}" for i, m in zip(ids.tolist(), mask.tolist(), strict=True)], row
    assert lines[len(rows) :] == list(CLASSES)


def test_the_cpp_sample_prepares_pictures_as_training_did(picture_program: Small, tmp_path: Path) -> None:
    loaded, dataset, artifact = picture_program
    folder = copy_to_kit(artifact.path, find("linux"), tmp_path / "kit")
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


def lines_of_cpp(folder: Path, rows: list[str]) -> list[str]:
    """What the sample prints, built as its README says, against the libraries of the executorch that is installed."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    (package,) = importlib.util.find_spec("executorch").submodule_search_locations
    build = folder / "cpp" / "build"
    for command in (
        ["-S", str(build.parent), "-B", str(build), f"-DCMAKE_PREFIX_PATH={package}"],
        ["--build", str(build)],
    ):
        done = subprocess.run([cmake, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    done = subprocess.run([build / "answer", folder, *rows], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def answers_of(line: str, row: str) -> dict[str, float]:
    """Scores in per cent by label."""
    assert line.startswith(f"{row}: ")
    return {
        label: float(score) for label, score in re.findall(r"(.+?) (\d+\.\d) %(?:, |$)", line.removeprefix(f"{row}: "))
    }


def check_cpp(folder: Path, rows: list[str], model: nn.Module, inputs: Any) -> None:
    """The C++ sample's answers beside the model's."""
    with torch.no_grad():
        logits = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    scores = 100 * logits.softmax(1)
    for line, row, expected in zip(lines_of_cpp(folder, rows), rows, scores, strict=True):
        answers = answers_of(line, row)
        best = expected.topk(min(3, len(CLASSES)))
        assert list(answers) == [CLASSES[place] for place in best.indices]
        assert list(answers.values()) == pytest.approx(best.values.tolist(), abs=0.6)  # printed in tenths


def test_the_cpp_sample_answers_texts_as_the_model_does(text_program: Small, tmp_path: Path) -> None:
    loaded, dataset, artifact = text_program
    folder = copy_to_kit(artifact.path, find("linux"), tmp_path / "kit")
    rows = [str(row) for row in dataset.test.inputs]
    check_cpp(folder, rows, loaded.model, loaded.encode(rows, TOKENS))


def test_the_cpp_sample_answers_pictures_as_the_model_does(picture_program: Small, tmp_path: Path) -> None:
    loaded, dataset, artifact = picture_program
    folder = copy_to_kit(artifact.path, find("linux"), tmp_path / "kit")
    rows = []
    for number, path in enumerate(dataset.test.inputs):
        rows.append(str(folder / f"{number}.ppm"))
        ImageOps.exif_transpose(Image.open(path)).convert("RGB").save(rows[-1])
    check_cpp(folder, rows, loaded.model, loaded.encode([Path(row) for row in rows]))


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


def test_a_language_model_talks_from_its_kit(talking: Artifact, tmp_path: Path) -> None:
    folder = copy_to_kit(talking.path, find("linux"), tmp_path / "kit")
    message = "a small model talks"
    command = [sys.executable, "-c", GENERATE, str(folder), message]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    expected = generate(talking.path, message, max_tokens=12)
    assert len(expected.tokens) > 3
    text = done.stdout.decode()
    assert expected.text.startswith(text.rstrip("\ufffd")), "a character whose bytes never came is left out"
    assert len(text) > 0


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
    check_sample(run_sample(tmp_path / "kit", rows), found.model, inputs, known["carried"]["labels"])
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
    told = run_sample(tmp_path / "kit", [str(path) for path in paths])
    check_sample(told, found.model, rows, known["carried"]["labels"])
    assert known["carried"]["labels"] == list(data.classes)
