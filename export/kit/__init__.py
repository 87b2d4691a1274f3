"""A kit for a device: the program, what it carries, its card, a short sample and a README, in one folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from string import Template

from edgetune.core.errors import EdgetuneError
from edgetune.core.files import build_folder, write_atomically
from edgetune.export.kit import classifier, language
from edgetune.export.kit.platforms import PLATFORMS, Platform, find, target_for
from edgetune.program.artifact import Artifact
from edgetune.program.card import card_path
from edgetune.program.manifest import manifest_path

__all__ = ["PLATFORMS", "check", "find", "kit_of", "new_kit", "target_for"]

check = classifier.check

_CODE = (".kt", ".py", ".cpp", "linux/text.hpp", "linux/picture.hpp")  # copied as it is; the rest has fields to fill
_SWIFT = "Package.swift"  # of Swift only this one


def new_kit(platform: Platform, folder: Path, make: Callable[[Path], Artifact]) -> Path:
    """A kit in `folder`, which must not be there or be empty; `make` writes the program to the path it is given.

    Nothing is left where that, or the kit, fails.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise EdgetuneError("the folder of the kit already exists", got=str(folder), action="choose another with -o")
    with build_folder(folder) as unfinished:
        beside = unfinished / platform.model
        beside.mkdir(parents=True, exist_ok=True)
        made = make(beside / "model.pte")
        if made.manifest.language is None:
            fields = classifier.fields(platform, made, unfinished)
            _fill(unfinished, classifier.files(platform, made), fields)
        else:
            _fill(unfinished, platform.talk, language.fields(platform, made, language.beside(made)))
    return folder


def kit_of(program: Path, platform: Platform, folder: Path) -> Path:
    """A kit of a program that was exported before, with what lies beside it."""
    manifest = Artifact.load(program, "model", "language").manifest
    target_for(platform, None, manifest.target)  # raises where the platform cannot run it
    if manifest.language is None:
        check(platform, manifest.carried)

    def copied(path: Path) -> Artifact:
        for file in (program, manifest_path(program), card_path(program)):
            if file.is_file():
                shutil.copyfile(file, path.with_suffix(file.suffix))
        for name in manifest.files:  # they keep the names that the manifest gives them
            shutil.copyfile(program.with_name(name), path.with_name(name))
        return Artifact.load(path)

    return new_kit(platform, folder, copied)


def template(name: str) -> str:
    """A file of this package."""
    return resources.files("edgetune.export.kit").joinpath(name).read_text(encoding="utf-8")


def _fill(folder: Path, files: Mapping[str, str], fields: Mapping[str, str]) -> None:
    filled = dict(fields)
    if "linux/main.cpp" in files:
        filled["cpp"] = Template(template("linux/cpp.md")).substitute(fields)
    for source, goal in files.items():
        text = template(source)
        as_it_is = source.endswith(_CODE) or (source.endswith(".swift") and not source.endswith(_SWIFT))
        write_atomically(folder / goal, text if as_it_is else Template(text).substitute(filled))
