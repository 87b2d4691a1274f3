"""Two processes that share the rows have the gradients of one, under every trainer; see distributed_worker.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

WORKER = Path(__file__).parent / "support" / "distributed_worker.py"
FAST = [("ddp", "lora"), ("ddp", "in-backward")]
SLOW = [
    ("ddp", "sparse"), ("ddp", "nf4-lora"),
    *[(trainer, kind) for trainer in ("accelerate", "trainer", "lightning") for kind in ("lora", "sparse", "nf4-lora")],
]  # fmt: skip


def launch(folder: Path, processes: int, *arguments: str) -> dict[str, Tensor]:
    folder.mkdir()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), str(WORKER), str(folder), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "result.safetensors")


def check(folder: Path, trainer: str, techniques: str) -> None:
    one, two = (launch(folder / str(count), count, trainer, techniques) for count in (1, 2))
    assert one.keys() == two.keys()
    for kind in ("gradient", "final"):
        values = {name: value for name, value in one.items() if name.startswith(f"{kind}.")}
        largest = max(float(value.abs().max()) for value in values.values())
        assert largest > 1e-3
        for name, value in values.items():
            assert (two[name] - value).abs().max() <= 1e-5 * max(1.0, largest), name
    for stage in ("plain", "program"):
        torch.testing.assert_close(two[f"logits.{stage}"], two["logits.open"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("trainer", "techniques"), FAST)
def test_two_processes_train_as_one_does(trainer: str, techniques: str, tmp_path: Path) -> None:
    check(tmp_path, trainer, techniques)


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "techniques"), SLOW)
def test_two_processes_train_as_one_does_under_every_trainer(trainer: str, techniques: str, tmp_path: Path) -> None:
    check(tmp_path, trainer, techniques)


@pytest.mark.slow
def test_a_sharded_model_is_refused_by_name(tmp_path: Path) -> None:
    done = launch(tmp_path / "2", 2, "fsdp2", "lora")
    assert done["refused"].tolist() == [1, 1, 1, 1, 1]  # apply, finalize, export, save_adapter, a 4-bit layer
