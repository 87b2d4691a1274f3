"""Make a kit for a device: a folder with the program, its metadata and card, sample code and a README."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from string import Template

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.files import build_folder, write_atomically
from edgetune.export.kit import classifier, language
from edgetune.export.kit.platforms import PLATFORMS, Platform, find, path_of, target_for
from edgetune.program.artifact import Artifact
from edgetune.program.card import card_path
from edgetune.program.manifest import Manifest, manifest_path

__all__ = ["PLATFORMS", "check", "copy_to_kit", "create_kit", "find", "target_for"]

check = classifier.check

# Copied unchanged; other templates have fields.
_CODE = (".kt", ".py", ".cpp", "linux/text.hpp", "linux/picture.hpp", "linux/CMakeLists.txt")


def create_kit(platform: Platform, folder: Path, make: Callable[[Path], Artifact]) -> Path:
    """Make a kit in `folder`, which must be new or empty; `make` writes the program to the path that it is given.

    If anything fails, nothing is left in `folder`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise EdgetuneError("the folder of the kit already exists", got=str(folder), action="choose another with -o")
    with build_folder(folder) as unfinished:
        assets = unfinished / platform.model
        assets.mkdir(parents=True, exist_ok=True)
        artifact = make(assets / "model.pte")
        _refuse_adapters(artifact.manifest)
        if artifact.manifest.language is None:
            fields = classifier.fields(platform, artifact, unfinished)
            _fill(unfinished, classifier.files(platform, artifact), fields)
        else:
            files = {template: path_of(template) for template in platform.generation}
            _fill(unfinished, files, language.fields(platform, artifact))
    return folder


def copy_to_kit(program: Path, platform: Platform, folder: Path) -> Path:
    """Make a kit of an existing program, with the files next to it."""
    manifest = Artifact.load(program, "model", "language").manifest
    target_for(platform, None, manifest.target)  # raises if the platform cannot run it
    _refuse_adapters(manifest)
    if manifest.language is None:
        check(platform, manifest.carried)

    def copy(path: Path) -> Artifact:
        for file in (program, manifest_path(program), card_path(program)):
            if file.is_file():
                shutil.copyfile(file, path.with_suffix(file.suffix))
        for name in manifest.files:  # under the names in the manifest
            shutil.copyfile(program.with_name(name), path.with_name(name))
        return Artifact.load(path)

    return create_kit(platform, folder, copy)


def _refuse_adapters(manifest: Manifest) -> None:
    if manifest.adapters is not None:
        raise EdgetuneError(
            "the sample code of a kit runs no adapter",
            got=[file.name for file in manifest.adapters.files],
            action="make a kit of the base with one adapter merged: edgetune export hf:BASE --adapter FOLDER",
            exit_code=Exit.EXPORT,
        )


def _fill(folder: Path, files: Mapping[str, str], fields: Mapping[str, str]) -> None:
    package = resources.files("edgetune.export.kit")
    values = dict(fields)
    if "linux/main.cpp" in files:
        values["cpp"] = Template(package.joinpath("linux/cpp.md").read_text(encoding="utf-8")).substitute(fields)
    for template, path in files.items():
        text = package.joinpath(template).read_text(encoding="utf-8")
        is_code = template.endswith(_CODE) or (template.endswith(".swift") and not template.endswith("Package.swift"))
        write_atomically(folder / path, text if is_code else Template(text).substitute(values))
