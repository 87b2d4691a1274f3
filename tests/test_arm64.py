"""Programs run by the arm64 wheels, emulated: the same values as here. `make test-arm64` fetches what it takes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from edgetune.core.technique import Sample
from edgetune.export import export
from edgetune.quant.int4 import Int4
from edgetune.quant.int8 import Int8
from edgetune.runtime.hosts.ssh import clock_zip
from edgetune.runtime.run import run_in_child, write_request
from support.arm64 import command

ARM64 = Path(os.environ.get("EDGETUNE_DATA", ".venv/share")).resolve() / "arm64"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ARM64.is_dir(), reason="make test-arm64 fetches the emulator and the arm64 wheels"),
]
# A Raspberry Pi 5, and a core with the 8-bit matrix products, bfloat16 and SVE2 of newer phones. Without SME: qemu 7.2,
# the first to have it, computes other values for int8 with it, and no machine was at hand to say who is right.
CORES = ("cortex-a76", "max,sme=off")
OUTPUTS = """
import sys
sys.path.insert(0, "clock.pyz")
from pathlib import Path
from clock.runs import inputs_in, loaded_runtime
import torch
program = loaded_runtime(1)._load_for_executorch("model.pte")
rows = inputs_in(Path("."), 4)
torch.save([[out.clone() for out in program.run_method("forward", row)] for row in rows], "outputs.pt")
"""


class _Net(nn.Module):
    """A convolution of each kind, and two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32, 64)
        self.out = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.point(torch.relu(self.deep(torch.relu(self.conv(x))))))
        scores: torch.Tensor = self.out(torch.relu(self.head(x.mean((2, 3)))))
        return scores


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("kind", ["fp32", "int8", "8da4w"])
def test_a_program_computes_the_same_on_arm64(tmp_path: Path, kind: str, core: str) -> None:
    torch.manual_seed(0)
    net, pictures = _Net().eval(), torch.randn(4, 3, 24, 24)
    if kind != "fp32":
        technique = Int8() if kind == "int8" else Int4()
        net = technique.apply(net, Sample.of(pictures))
    artifact = export(
        net, pictures, tmp_path / "model.pte", target="xnnpack", one_row=True, min_same_prediction_pct=0.0
    )
    rows = [(picture,) for picture in pictures.split(1)]
    expected = [row[0] for row in run_in_child(artifact.path, rows)]
    write_request(tmp_path, {"path": "model.pte", "threads": 1}, rows)
    (tmp_path / "clock.pyz").write_bytes(clock_zip())
    subprocess.run([*command(ARM64, core), "-c", OUTPUTS], cwd=tmp_path, check=True, timeout=600)
    found = [row[0] for row in torch.load(tmp_path / "outputs.pt", weights_only=True)]
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # else the test is vacuous


def test_the_stopwatch_runs_there(tmp_path: Path) -> None:
    pictures = torch.randn(1, 3, 24, 24)
    export(_Net().eval(), pictures, tmp_path / "model.pte", target="xnnpack")
    asked = {"path": "model.pte", "threads": 1, "seconds": 0.01, "batch_warm_ups": 3, "batch_runs": 20}
    write_request(tmp_path, asked, [(pictures,)])
    (tmp_path / "clock.pyz").write_bytes(clock_zip())
    subprocess.run([*command(ARM64), "clock.pyz", "."], cwd=tmp_path, check=True, timeout=600)
    told = (tmp_path / "result.json").read_text()
    assert '"machine": "aarch64"' in told
    assert '"latencies_ms": [' in told, told
