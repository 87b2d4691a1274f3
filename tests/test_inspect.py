"""Inspection: what a program file tells by itself, and what becomes of files that are none."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from edgetune.capture.positional import Positional
from edgetune.cli import export as cli_export
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.export import export
from edgetune.export.inspect import inspect
from edgetune.export.lower import lower
from edgetune.export.targets import find
from edgetune.program.artifact import Artifact
from edgetune.program.inspection import Inspection
from edgetune.report.inspect_page import page


class Net(nn.Module):
    """A table and a norm that stay with portable kernels, and linears that XNNPACK takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(40, 24)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.table(ids))).sum(1)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("inspect") / "model.pte"
    return export(Net().eval(), torch.randint(0, 40, (4, 8)), path, device="pixel-8", one_row=True)


@pytest.fixture(scope="module")
def found(artifact: Artifact) -> Inspection:
    return inspect(artifact.path)


def alone(artifact: Artifact, folder: Path) -> Path:
    """The program without its manifest."""
    return Path(shutil.copy(artifact.path, folder / "alone.pte"))


def test_the_file_alone_gives_what_the_manifest_says(artifact: Artifact, tmp_path: Path) -> None:
    known = artifact.manifest
    found = inspect(alone(artifact, tmp_path))
    assert found.beside is None
    assert "no model.json" in str(found)
    (method,) = found.methods
    assert method.name == "forward"
    assert [(slot.dtype, slot.shape) for slot in method.inputs] == [(i.dtype, i.shape) for i in known.main.inputs]
    assert [(slot.dtype, slot.shape) for slot in method.outputs] == [(o.dtype, o.shape) for o in known.main.outputs]
    assert (found.size_bytes, found.sha256) == (known.size_bytes, known.sha256)
    assert sum(method.arenas_bytes) == known.main.plan_bytes
    assert sum(delegate.calls for delegate in method.delegates) == known.main.delegates
    assert {delegate.backend for delegate in method.delegates} == {"XnnpackBackend"}


def test_operators_are_counted_by_name(found: Inspection) -> None:
    counts = {operator.name: operator.count for operator in found.methods[0].operators}
    assert counts["aten::embedding.out"] == 1
    assert counts["aten::native_layer_norm.out"] == 1
    assert not any("linear" in name or "addmm" in name for name in counts)


def test_constants_come_largest_first_with_type_and_shape(found: Inspection) -> None:
    sizes = [constant.size_bytes for constant in found.constants]
    assert sizes == sorted(sizes, reverse=True)
    table = found.constants[0]
    assert (table.dtype, table.shape, table.size_bytes) == ("float32", (40, 24), 40 * 24 * 4)


def test_the_parts_are_the_whole_file(found: Inspection) -> None:
    assert sum(part.size_bytes for part in found.parts) == found.size_bytes
    assert all(part.size_bytes > 0 for part in found.parts)
    parts = {part.name: part.size_bytes for part in found.parts}
    held = sum(constant.size_bytes for constant in found.constants if constant.kind == "constant")
    assert parts["constants"] >= held


def test_what_the_manifest_adds(artifact: Artifact, found: Inspection) -> None:
    assert found.beside is not None
    assert found.beside.checksum_ok
    assert (found.beside.target, found.beside.device) == ("xnnpack", "pixel-8")
    assert found.beside.versions == artifact.manifest.versions
    assert "same prediction pct 100" in found.beside.parity
    assert "checksum" in str(found)
    assert "ok" in str(found)


def test_a_manifest_of_another_program_is_named(artifact: Artifact, tmp_path: Path) -> None:
    path = alone(artifact, tmp_path)
    known = json.loads(artifact.path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**known, "sha256": "0" * 64}))
    found = inspect(path)
    assert found.beside is not None
    assert not found.beside.checksum_ok
    assert "WRONG" in str(found)
    path.with_suffix(".json").write_text("{")
    assert "cannot be read" in str(inspect(path))


def test_portable_programs_have_no_delegates(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    x = torch.randint(0, 40, (1, 8))
    path.write_bytes(lower(Positional(Net().eval(), x).eval(), (x,), find("portable")).data)
    found = inspect(path)
    assert found.methods[0].delegates == ()
    assert {constant.shape for constant in found.constants} >= {(40, 24), (24,)}
    assert "delegated" not in str(found)


def test_what_is_no_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    for rubbish in (b"", b"\0" * 300, b"PK\x03\x04" + b"zip" * 99):
        path.write_bytes(rubbish)
        with pytest.raises(EdgetuneError, match="not an ExecuTorch program") as caught:
            inspect(path)
        assert caught.value.exit_code == Exit.EXPORT
    with pytest.raises(EdgetuneError, match="no such program"):
        inspect(tmp_path / "none.pte")


def test_a_cut_file_is_damaged(artifact: Artifact, tmp_path: Path) -> None:
    data = artifact.path.read_bytes()
    path = tmp_path / "cut.pte"
    for kept in (20, 60, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:kept])
        with pytest.raises(EdgetuneError, match="damaged") as caught:
            inspect(path)
        assert caught.value.exit_code == Exit.EXPORT


def test_a_senseless_number_does_not_end_this_process(artifact: Artifact, tmp_path: Path) -> None:
    data = artifact.path.read_bytes()
    plan = struct.pack("<qq", 0, artifact.manifest.main.plan_bytes)  # sizes of the arenas: the runtime aborts on such
    assert data.count(plan) == 1
    path = tmp_path / "wrong.pte"
    path.write_bytes(data.replace(plan, struct.pack("<qq", 0, -5)))
    with pytest.raises(EdgetuneError, match=r"damaged.*negative size") as caught:
        inspect(path)
    assert caught.value.exit_code == Exit.EXPORT


def test_files_with_wrong_bytes_are_told_or_refused(artifact: Artifact, tmp_path: Path) -> None:
    data = artifact.path.read_bytes()
    path = tmp_path / "wrong.pte"
    draw = random.Random(0)
    codes = []
    for _ in range(150):
        wrong = bytearray(data)
        for _ in range(3):
            wrong[draw.randrange(8, 1500)] = draw.randrange(256)  # the flatbuffer and its header
        path.write_bytes(wrong)
        try:
            str(inspect(path))
        except EdgetuneError as error:
            codes.append(error.exit_code)
    assert len(codes) > 20
    assert set(codes) == {Exit.EXPORT}


def test_the_page_stands_alone(found: Inspection) -> None:
    text = page(found)
    assert "http" not in text.replace("http-equiv", "")
    assert "<script" not in text
    assert "aten::native_layer_norm.out" in text
    assert "XnnpackBackend" in text
    assert len(text) < 100_000
    assert "<b>x</b>" not in page(found.model_copy(update={"path": "<b>x</b>.pte"}))


def test_the_verb_prints_text_json_and_a_page(
    artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli_export.inspect(artifact.path, html=tmp_path / "out.html") == 0
    assert "method forward" in capsys.readouterr().out
    assert "Method forward" in (tmp_path / "out.html").read_text()
    assert cli_export.inspect(artifact.path, as_json=True) == 0
    assert Inspection.model_validate_json(capsys.readouterr().out) == inspect(artifact.path)
