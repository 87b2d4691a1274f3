"""Families through the whole line: a few here, all of them as slow tests and, as a table, by bench_export.py."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_export import MIN_LOWERED, delegated, document, load_libraries, reasons, shown, verdicts, whole, work
from bench_export_worker import COLUMNS, adaptable
from torch import nn

from edgetune.core.inputs import call, logits_of, tensors_of
from support.families import FAMILIES, Family
from support.timm_apart import TIMM

ISSUE = """MobileNetV3, MobileNetV4, MobileOne, EfficientNet, EfficientNet-Lite, RegNet, ReXNet, GENet, TResNet, SHViT,
StarNet, FBNetV3, EfficientViT (MIT), EfficientViT-SAM encoder, RepViT, FastViT, MobileViTv2, ConvNeXt-atto, ViT-tiny,
TinyViT, SqueezeNet, ShuffleNetV2, ResNet, pose head, segmentation head, BERT, MiniLM, DistilBERT, ModernBERT,
T5-small, Llama, SmolLM2, Qwen3, Gemma 3, Phi, MobiLlama, OLMoE, Mixtral, Mamba, linear attention (CHELA-like),
Whisper encoder, Whisper decoder, CLIP, voice detector (LSTM)"""

GOOD = {
    "state": "done", "stage": "export", "bits": "fp32", "relative_difference": 1e-6, "same_prediction_pct": 100.0,
    "delegated_macs_pct": 100.0, "delegates": 1, "size_bytes": 2**20, "undelegated_kernels": [], "undelegated": [],
}  # fmt: skip
LEFT = {"operator": "aten.convolution.default", "module": "stem", "macs": 9, "shape": [1, 2]}


def through(name: str, column: str) -> dict[str, Any]:
    """What the bench finds for one cell."""
    found: dict[str, Any] = {}
    load_libraries()
    work([(FAMILIES[name], column)], 1, 600.0, found.__setitem__)
    (cell,) = found.values()
    assert isinstance(cell, dict)
    return cell


def test_the_list_is_that_of_the_issue() -> None:
    wanted = {name.strip() for name in ISSUE.replace("\n", " ").split(",")}
    assert wanted | {"EfficientViT (MSRA)"} == set(FAMILIES)


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.source != "timm"], ids=lambda f: f.name)
def test_a_family_is_built_alike_and_tells_its_rows_apart(family: Family) -> None:
    """Rows must have logits of their own, or equal outputs would prove nothing."""
    rows = family.inputs(3)
    with torch.no_grad():
        first, again = (logits_of(call(family.made(), rows)) for _ in range(2))
    assert torch.equal(first, again)
    assert all(t.shape[0] == 3 for t in (first, *tensors_of(rows)))
    assert bool(torch.isfinite(first).all())
    assert float((first[0] - first[1]).abs().max()) > 1e-3 * float(first.abs().max())
    assert adaptable(family.made())


@pytest.mark.parametrize(("name", "column"), [("SqueezeNet", "fp32"), ("Llama", "fp32")])
def test_through_the_whole_line(name: str, column: str) -> None:
    cell = through(name, column)
    assert cell["state"] == "done", cell["reason"]
    assert whole(cell), shown(cell)
    assert delegated(cell), cell["undelegated"]
    assert cell["rows"] == 100
    assert cell["changed_tensors"] > 0


CHILD = """
import sys
import bench_export as bench
found = {}
bench.load_libraries()
bench.work([(bench.FAMILIES[sys.argv[1]], sys.argv[2])], 1, 900.0, found.__setitem__)
(cell,) = found.values()
assert bench.whole(cell), bench.wrong_with(cell, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.skipif(not TIMM.is_dir(), reason="tests/assets.txt, by `make test`")
@pytest.mark.parametrize("column", ["fp32", "quantized"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_through_the_whole_line(name: str, column: str) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    child = subprocess.run(
        [sys.executable, "-c", CHILD, name, column],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]


# What the table says


def cells(**changes: Any) -> dict[str, Any]:
    found = {f"{name}/{column}": dict(GOOD) for name in FAMILIES for column in COLUMNS}
    for name in FAMILIES:
        found[f"{name}/quantized"]["bits"] = FAMILIES[name].bits
    return {**found, **changes}


def test_all_reached_where_all_is_well() -> None:
    assert all(met for met, _ in verdicts(cells()))
    assert reasons(cells()) == []
    assert "MISSED" not in document(cells())


def test_nothing_measured_is_nothing_reached() -> None:
    assert not any(met for met, _ in verdicts({}))
    page = document({})
    assert all(f"| {name} |" in page for name in FAMILIES)
    assert page.count("MISSED") == 4


@pytest.mark.parametrize(
    ("column", "change", "missed", "said"),
    [
        ("fp32", {"relative_difference": 2e-4}, 0, "outputs differ by 2.0e-04"),
        ("fp32", {"relative_difference": float("nan")}, 0, "outputs differ"),
        ("quantized", {"same_prediction_pct": 98.0}, 0, "98.0 % the same"),
        ("quantized", {"delegated_macs_pct": 50.0, "undelegated": [LEFT]}, 1, "aten.convolution.default in stem"),
        ("fp32", {"state": "refused", "reason": "no kernel for x::y"}, 0, "refused at export: no kernel for x::y"),
        ("coreml", {"state": "crashed", "reason": "the process ended with code -11"}, 2, "code -11"),
        ("vulkan", {"delegates": 0, "delegated_macs_pct": 0.0}, 3, "0.0 % of the MACs"),
    ],
)
def test_what_fails_counts_and_is_named(column: str, change: dict[str, Any], missed: int, said: str) -> None:
    """In half of the families: more than what each line may lose."""
    found = cells()
    for name in list(FAMILIES)[::2]:
        found[f"{name}/{column}"] |= change
    met = [met for met, _ in verdicts(found)]
    assert not met[missed]
    assert met.count(False) <= 2
    assert all(said in line for line in reasons(found))
    assert len(reasons(found)) == len(list(FAMILIES)[::2])
    assert len(FAMILIES) - len(reasons(found)) < MIN_LOWERED


def dies() -> nn.Module:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def sleeps() -> nn.Module:
    while True:
        time.sleep(0.05)


def raises() -> nn.Module:
    raise RuntimeError("no such | layer\nat all")


@pytest.mark.parametrize(
    ("build", "seconds", "state", "reason"),
    [
        (dies, 60.0, "crashed", r"code -9"),
        (sleeps, 0.5, "timeout", r"no end after 0 s|no end after 1 s"),
        (raises, 60.0, "failed", r"RuntimeError: no such \| layer"),
    ],
)
def test_a_cell_that_does_not_come_through_says_so(build: Any, seconds: float, state: str, reason: str) -> None:
    found: dict[str, Any] = {}
    work([(Family("odd", build, lambda n: torch.ones(n, 1), "int8", "here"), "fp32")], 1, seconds, found.__setitem__)
    cell = found["odd/fp32"]
    assert (cell["state"], cell["stage"]) == (state, "build")
    assert re.search(reason, cell["reason"])
