from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import edgetune as et
from edgetune.core import registry
from edgetune.export.kit import PLATFORMS
from edgetune.profile import device
from edgetune.recipe import recipe

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("transformers", "peft", "executorch", "torchao", "bitsandbytes", "sklearn", "plotly", "typer")


def read_project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read_requirements(*path: str) -> list[Requirement]:
    """The requirements of a file, without its comments."""
    lines = ROOT.joinpath(*path).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def read_pins(*path: str) -> dict[str, list[tuple[Requirement, Version]]]:
    """Every line of a file by the package's name, with the one version that it allows."""
    pins: dict[str, list[tuple[Requirement, Version]]] = {}
    for requirement in read_requirements(*path):
        (only,) = requirement.specifier
        assert (only.operator, "*" in only.version) == ("==", False), f"{requirement} is no pin"
        assert requirement.url is None
        pins.setdefault(canonicalize_name(requirement.name), []).append((requirement, Version(only.version)))
    return pins


def installed_requirements(extra: str) -> list[Requirement]:
    """What `pip install edgetune[extra]` asks for: the dependencies, the extra, and the extras that it names."""
    project = read_project()["project"]
    requirements, extras, names = [*map(Requirement, project["dependencies"])], [extra], {extra}
    while extras:
        for requirement in map(Requirement, project["optional-dependencies"][extras.pop()]):
            if requirement.name != "edgetune":
                requirements.append(requirement)
            extras += requirement.extras - names if requirement.name == "edgetune" else ()
            names |= requirement.extras
    return requirements


def test_the_packages_listed_are_those_of_the_tree() -> None:
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "edgetune").rglob("__init__.py")}
    for name in ("export", "recipes", "devices"):  # at the top of the repository, inside the package
        inside = (ROOT / name).rglob("__init__.py")
        found |= {".".join(("edgetune", *p.parent.relative_to(ROOT).parts)) for p in inside}
    assert set(read_project()["tool"]["setuptools"]["packages"]) == found


def test_data_is_found_where_it_is_installed() -> None:
    assert {"text-minilm", "vision-effnet-lite0", "lm-smollm2"} <= set(recipe.packaged_recipes())
    assert "pixel-8" in device.device_ids()
    assert resources.files("edgetune.recipes").joinpath("assets.txt").is_file()
    assert resources.files("edgetune").joinpath("py.typed").is_file()


def test_every_template_of_a_kit_is_shipped() -> None:
    """Package data are named by pattern: a file that no pattern takes would be missing in the wheel."""
    folder = ROOT / "export" / "kit"
    patterns = read_project()["tool"]["setuptools"]["package-data"]["edgetune.export.kit"]
    files = {file for file in folder.glob("*/*") if "__pycache__" not in file.parts}
    assert {file for pattern in patterns for file in folder.glob(pattern)} == files
    sources = {
        template for p in PLATFORMS.values() for part in (p.common, p.text, p.image, p.generation) for template in part
    }
    assert {str(file.relative_to(folder)) for file in files} == sources | {"linux/cpp.md"}


def test_import_is_light_and_changes_nothing() -> None:
    script = f"""
import json, os, sys
import torch
before = dict(os.environ)
import edgetune
print(json.dumps([[m for m in {HEAVY!r} if m in sys.modules], dict(os.environ) == before, torch.cuda.is_initialized()]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], True, False]
    assert done.stderr == ""


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = read_project()["project"]
    assert (citation["title"], citation["version"], citation["license"]) == ("edgetune", et.__version__, "Apache-2.0")
    assert citation["version"] == project["version"]
    assert citation["authors"] == project["authors"]


def test_every_install_line_names_an_extra() -> None:
    assert set(registry.EXTRAS.values()) <= set(read_project()["project"]["optional-dependencies"])


def test_every_technique_has_its_names() -> None:
    for name in registry.TECHNIQUES:
        kind = registry.technique_class(name)
        assert kind.name == name
        assert getattr(et, kind.__name__) is kind
    assert sorted(et.__all__) == sorted(set(et.__all__))
    assert all(hasattr(et, name) for name in et.__all__)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_the_lock_pins_every_requirement_of_the_tests_within_its_range(python: str) -> None:
    """`make lock` was run since a range was changed. A package may have a pin for each Python version."""
    pins = read_pins("constraints.txt")
    here = {"python_version": python, "python_full_version": f"{python}.0"}
    requirements = [each for extra in ("dev", "docs", "timm") for each in installed_requirements(extra)]
    assert {"torch", "pydantic", "transformers", "lightning", "hypothesis", "mypy"} <= {r.name for r in requirements}
    for requirement in requirements:
        candidates = pins.get(canonicalize_name(requirement.name), [])
        versions = [version for pin, version in candidates if pin.marker is None or pin.marker.evaluate(here)]
        assert len(versions) == 1, f"{requirement} has {len(versions)} pins for Python {python}; run make lock"
        assert requirement.specifier.contains(versions[0]), f"{requirement} is pinned to {versions[0]}; run make lock"


def test_the_lock_is_for_any_machine() -> None:
    """No hosts, no paths, no builds of one machine (`2.13.0` allows `2.13.0+cpu`; the reverse is not so)."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not [word for word in ("://", "/", "--", "@") if word in text]
    assert not [version for pins in read_pins("constraints.txt").values() for _, version in pins if version.local]


@pytest.mark.parametrize("path", [("recipes", "assets.txt"), ("tests", "assets.txt")])
def test_models_and_data_are_pinned(path: tuple[str, ...]) -> None:
    assert read_pins(*path)


def test_what_is_installed_is_what_the_lock_names() -> None:
    """Where the suite runs on the lock, that is what it tests; `make test-latest` is in a folder of its own."""
    if Path(sys.prefix).name == "latest":
        pytest.skip("this is the run with the newest versions")
    pins = read_pins("constraints.txt")
    # of this environment alone: setuptools puts what it brings along on the path as well, once it is imported
    found = metadata.distributions(path=[sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    installed = {canonicalize_name(each.name): Version(each.version).public for each in found}
    assert len(installed) > 50
    for name, candidates in pins.items():
        for pin, version in candidates:
            if name in installed and (pin.marker is None or pin.marker.evaluate()):
                assert installed[name] == str(version), f"{name}; run make test"


def test_the_wheel_keeps_the_open_ranges() -> None:
    ours = {str(r) for r in map(Requirement, metadata.requires("edgetune") or []) if r.marker is None}
    assert ours == {str(Requirement(text)) for text in read_project()["project"]["dependencies"]}
    assert not [text for text in ours if "==" in text]
