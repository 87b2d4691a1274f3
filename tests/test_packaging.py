from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import edgetune as et
from edgetune import recipe, registry
from edgetune.profile import device

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("transformers", "peft", "executorch", "torchao", "bitsandbytes", "torch_pruning", "sklearn", "plotly", "typer")


def listed(name: str) -> list[str]:
    """The strings of a list in pyproject.toml (3.10 has no reader of its own)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'"([^"]+)"', re.search(rf"^{name} = \[(.*?)\]", text, re.M | re.S)[1])


def test_the_packages_listed_are_those_of_the_tree() -> None:
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "edgetune").rglob("__init__.py")}
    for name in ("export", "recipes", "devices"):  # at the top of the repository, inside the package
        inside = (ROOT / name).rglob("__init__.py")
        found |= {".".join(("edgetune", *p.parent.relative_to(ROOT).parts)) for p in inside}
    assert set(listed("packages")) == found


def test_data_is_found_where_it_is_installed() -> None:
    assert {"text-minilm", "vision-effnet-lite0", "lm-smollm2"} <= set(recipe.names())
    assert "pixel-8" in device.ids()
    assert resources.files("edgetune.recipes").joinpath("assets.txt").is_file()
    assert resources.files("edgetune").joinpath("py.typed").is_file()


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


def test_every_technique_has_its_names() -> None:
    for name in registry.TECHNIQUES:
        kind = registry.technique(name)
        assert kind.name == name
        assert getattr(et, kind.__name__) is kind
    assert sorted(et.__all__) == sorted(set(et.__all__))
    assert all(hasattr(et, name) for name in et.__all__)
