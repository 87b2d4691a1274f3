"""The scripts of the README: they run, edgetune's lines can be taken out again, and the callbacks do the same."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgetune.core.apply import active_techniques, apply
from edgetune.core.errors import EdgetuneError
from edgetune.integrations.inside import announce, finalize_inside
from edgetune.sparse.update import SparseUpdate

HERE = Path(__file__).parent / "support"
MARK = "# edgetune"
SCRIPTS = ("plain", "trainer", "lightning")
ADD = "from edgetune.integrations.{} import callback; trainer.{}(callback())\n"
CALLBACKS = {
    "trainer": ("trainer.train()\n", ADD.format("hf", "add_callback")),
    "lightning": ("trainer.fit(", ADD.format("lightning", "callbacks.append")),
}
MERGED = {"plain": "2.weight", "trainer": "layer.0.attention.self.query.weight", "lightning": "net.2.weight"}
FROZEN = {"plain": "0.weight", "trainer": "word_embeddings", "lightning": "net.0.weight"}

# Run in a child, since these trainers change global things on import.
CHILD = """
import json, sys

def described(text):
    space = {"__name__": "__main__"}
    exec(compile(text, "script", "exec"), space)
    model = space["model"]
    return {
        "losses": space.get("losses", getattr(model, "losses", None)),
        "kinds": sorted({type(module).__name__ for module in model.modules()}),
        "attributes": sorted(name for name in vars(model) if "edgetune" in name or "peft" in name),
        "sums": {name: value.double().sum().item() for name, value in model.state_dict().items()},
        "loaded": {name: value.double().sum().item() for name, value in space["again"].state_dict().items()}
        if "again" in space else None,
        "imported": "edgetune" in sys.modules,
    }

print(json.dumps([described(text) for text in json.load(sys.stdin)]))
"""


def run(texts: list[str], folder: Path) -> list[dict[str, Any]]:
    """Run scripts one after the other in a child; what each left."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def without_edgetune(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.rstrip().endswith(MARK))


def script(name: str) -> str:
    return (HERE / f"examples_{name}.py").read_text(encoding="utf-8")


def variants(name: str) -> list[str]:
    """The script up to where edgetune comes in, all of it, and with the callback in place of `finalize`."""
    text = script(name)
    apply_line = next(line for line in text.splitlines() if line.endswith(MARK) and "et.apply(" in line)
    texts = [without_edgetune(text[: text.index(apply_line)]), text]
    if name in CALLBACKS:
        before, line = CALLBACKS[name]
        texts.append(text.replace(before, line + before).replace("model = et.finalize(model)", "pass"))
    return texts


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each script left without edgetune, and then each of its variants: one child imports once for all."""
    texts = {name: variants(name) for name in SCRIPTS}
    bare = [without_edgetune(script(name)) for name in SCRIPTS]
    results = iter(run([*bare, *itertools.chain(*texts.values())], tmp_path_factory.mktemp("scripts")))
    plain = {name: next(results) for name in SCRIPTS}
    return {name: [plain[name], *itertools.islice(results, len(texts[name]))] for name in SCRIPTS}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_runs_and_so_does_what_it_was_made_from(name: str, ran: dict[str, list[dict[str, Any]]]) -> None:
    text = script(name)
    added = [line for line in text.splitlines() if line.endswith(MARK)]
    assert 3 <= len([line for line in added if "again" not in line]) <= 5
    assert any("et.finalize(" in line for line in added)
    bare = without_edgetune(text)
    assert "et." not in bare.replace("net.", "")
    plain, untrained, tuned, *called = ran[name]
    assert not plain["imported"]
    assert tuned["imported"]
    for each in (tuned, *called):
        assert each["kinds"] == plain["kinds"]
        assert each["attributes"] == []
        assert each["sums"].keys() == plain["sums"].keys()
        assert each["losses"][-1] < 0.6 * each["losses"][0]
    changed = {key for key, value in tuned["sums"].items() if value != untrained["sums"][key]}
    kept = set(tuned["sums"]) - changed
    assert any(MERGED[name] in key for key in changed)
    assert any(FROZEN[name] in key for key in kept)
    assert not any(FROZEN[name] in key for key in changed)
    for each in called:
        assert each["sums"] == tuned["sums"]
    for each in (tuned, *called) if name in CALLBACKS else ():
        assert each["loaded"] == tuned["sums"], "a checkpoint is loaded again"


def test_the_script_that_compresses_exports_three_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = runpy.run_path(str(HERE / "examples_compress.py"))
    assert done["losses"][-1] < 0.6 * done["losses"][0]
    assert {type(module).__name__ for module in done["model"].modules()} == {"Linear", "ReLU", "Sequential"}
    fp32, int8, int4 = ((tmp_path / f"{name}.pte").stat().st_size for name in ("fp32", "int8", "int4"))
    assert fp32 > int8 > int4


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))


def test_what_trains_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    model = two_layers()
    apply(model[0], SparseUpdate(scheme={"2": "full"}))
    caplog.set_level("INFO", "edgetune")
    assert announce(model) == "sparse-update: 10 of 30 parameters train (33 %)"
    assert "10 of 30" in caplog.text
    finalize_inside(model)
    assert active_techniques(model[0]) == ()
    assert all(parameter.requires_grad for parameter in model.parameters())


class Apart(nn.Module):
    """`spare` trains, but is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


@pytest.mark.parametrize("ends", ["ten steps", "epoch"])
def test_the_callback_of_transformers_names_what_no_backward_reaches(ends: str) -> None:
    from transformers import TrainerState

    from edgetune.integrations.hf import callback

    model, called, state = apply(Apart(), SparseUpdate(scheme={"*": "full"})), callback(), TrainerState(max_steps=50)
    called.on_train_begin(None, state, None, model=model)
    for _ in range(9 if ends == "ten steps" else 2):
        model(torch.ones(2, 4)).sum().backward()
        called.on_step_end(None, state, None, model=model)
    with pytest.raises(EdgetuneError, match=r"spare\.weight, spare\.bias: trainable, but no backward has reached it"):
        (called.on_step_end if ends == "ten steps" else called.on_epoch_end)(None, state, None, model=model)


def test_a_callback_with_nothing_to_do_says_so() -> None:
    with pytest.raises(EdgetuneError, match="no technique is applied"):
        announce(two_layers())
    model = two_layers()
    apply(model, SparseUpdate(scheme={"0.2": "full"}))
    model.requires_grad_(False)
    with pytest.raises(EdgetuneError, match="trainable"):
        announce(model)
