"""The manifest of every kind of program: read again as written, refused where it is another's, or of another format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from edgetune.cli import main
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.export.inspect import inspect
from edgetune.program.artifact import Artifact
from edgetune.program.manifest import Manifest, ProgramKind
from support.manifests import CALLS, manifest, stored

X = torch.zeros(1, 2)


@pytest.mark.parametrize("kind", CALLS)
def test_a_manifest_is_read_again_as_it_was_written(kind: ProgramKind, tmp_path: Path) -> None:
    artifact = stored(tmp_path, kind)
    assert Artifact.load(artifact.path) == artifact == Artifact.load(tmp_path), "the program, or its folder"
    assert tuple(call.name for call in artifact.manifest.calls) == CALLS[kind]
    assert artifact.manifest.main.name == CALLS[kind][-1]
    assert artifact.manifest.call(CALLS[kind][0]) is artifact.manifest.calls[0]
    assert set(artifact.manifest.files) == ({"model.tokenizer.json"} if kind == "language" else set())


VERBS = {
    "model": ["profile", "model.pte", "--device", "pixel-8"],
    "language": ["generate", "model.pte", "hello"],
    "training": ["train-pte", "model.pte", "text-minilm", "variant=smoke"],
    "methods": ["predict", "model.pte", "hello"],
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_manifest_of_format_1_is_refused_with_what_to_do(
    kind: ProgramKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they were written: what `calls` holds stood at the top."""
    monkeypatch.chdir(tmp_path)
    artifact = stored(tmp_path, kind)
    (first, *_) = artifact.manifest.calls
    old = {**artifact.manifest.model_dump(mode="json"), **first.model_dump(mode="json"), "format": 1}
    for name in ("calls", "language", "training", "name", "label"):
        del old[name]
    (tmp_path / "model.json").write_text(json.dumps(old))
    with pytest.raises(EdgetuneError, match="this version of edgetune reads only format 2: got 1") as caught:
        Artifact.load(artifact.path)
    assert (caught.value.exit_code, caught.value.action) == (Exit.EXPORT, "export the model again with this version")
    if kind != "training":  # which first loads the recipe's model
        assert main.main(VERBS[kind]) == Exit.EXPORT
        error = capsys.readouterr().err
        assert "model.json: the manifest is of another format" in error
        assert "next: export the model again with this version" in error


@pytest.mark.parametrize("kind", CALLS)
def test_a_program_of_another_kind_is_refused_with_what_takes_it(kind: ProgramKind, tmp_path: Path) -> None:
    artifact = stored(tmp_path, kind)
    for other in CALLS:
        if other != kind:
            with pytest.raises(EdgetuneError, match="a program of another kind: this is") as caught:
                Artifact.load(artifact.path, other)
            assert caught.value.exit_code == Exit.EXPORT
            assert caught.value.action
    assert Artifact.load(artifact.path, kind) == artifact
    for section in ("language", "training"):
        if section != kind:
            with pytest.raises(EdgetuneError, match="a program of another kind"):
                getattr(artifact, section)


def test_a_section_belongs_to_its_kind() -> None:
    for kind, other in (("language", "model"), ("training", "methods"), ("model", "language")):
        with pytest.raises(ValueError, match="sections are not those of a program of the kind"):
            Manifest.model_validate({**manifest(kind).model_dump(), "kind": other})  # type: ignore[arg-type]


def test_which_method_is_run_is_said_where_there_are_several(tmp_path: Path) -> None:
    artifact = stored(tmp_path, "methods")
    with pytest.raises(EdgetuneError, match=r"has several methods.*encode, decode"):
        artifact.run(X)
    with pytest.raises(EdgetuneError, match=r"no such method: got 'decodes'.*did you mean 'decode'"):
        artifact.run(X, method="decodes")


@pytest.mark.parametrize(("kind", "action"), [("language", "edgetune generate"), ("training", "edgetune train-pte")])
def test_what_keeps_something_between_its_calls_is_not_run_alone(
    kind: ProgramKind, action: str, tmp_path: Path
) -> None:
    with pytest.raises(EdgetuneError, match="a program of another kind") as caught:
        stored(tmp_path, kind).run(X)
    assert action in caught.value.action


def test_an_inspection_says_why_a_manifest_cannot_be_read(tmp_path: Path) -> None:
    import edgetune as et

    path = et.export(torch.nn.Linear(2, 2).eval(), X, tmp_path / "model.pte").path
    known = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**known, "format": 1}))
    assert "reads only format 2; export the model again" in str(inspect(path))
